"""Both engines: results in order, a bounded look-ahead, the function's own exceptions, nothing left behind."""

import copy
import os
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from acestep_pipeline.data.audio import AudioError, probe_audio
from acestep_pipeline.engines import LOOK_AHEAD, map_in_order
from acestep_pipeline.errors import UsageError
from acestep_pipeline.paths import cache_dir


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("map_in_order")]


def test_results_come_in_the_order_of_the_items():
    def slow_first(number: int) -> int:
        time.sleep(0.05 if number % 7 == 0 else 0)
        return number * number

    assert list(map_in_order(slow_first, range(50), num_workers=4)) == [number**2 for number in range(50)]
    assert list(map_in_order(slow_first, [], num_workers=4)) == []


def test_workers_run_at_the_same_time():
    both = threading.Barrier(2, timeout=10)
    assert list(map_in_order(lambda _: both.wait() >= 0, range(4), num_workers=2)) == [True] * 4


def test_no_more_items_are_taken_than_the_look_ahead():
    taken = 0

    def items():
        nonlocal taken
        for number in range(20_000):
            taken += 1
            yield number

    most = 0
    for number, result in enumerate(map_in_order(lambda item: item, items(), num_workers=2)):
        assert result == number
        most = max(most, taken - number)
    assert taken == 20_000 and most == LOOK_AHEAD * 2


def test_nothing_is_taken_before_the_first_result_is_asked_for():
    items = iter(range(5))
    results = map_in_order(str, items, num_workers=2)
    assert next(items) == 0 and list(results) == ["1", "2", "3", "4"]


def test_an_exception_comes_in_its_place_and_ends_the_work(tmp_path):
    done = []

    def fail_at_three(number: int) -> int:
        if number == 3:
            raise AudioError("number 3 is damaged")
        done.append(number)
        return number

    results = map_in_order(fail_at_three, range(1000), num_workers=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(AudioError, match="number 3 is damaged"):
        next(results)
    assert max(done) <= 3 + LOOK_AHEAD * 2
    assert own_threads() == [] and list(results) == []


def test_closing_early_leaves_no_thread_and_begins_nothing_more():
    begun = []

    def work(number: int) -> int:
        begun.append(number)
        time.sleep(0.01)
        return number

    results = map_in_order(work, range(1000), num_workers=2)
    assert next(results) == 0
    results.close()
    assert own_threads() == []
    count = len(begun)
    time.sleep(0.05)
    assert len(begun) == count <= LOOK_AHEAD * 2


def test_wrong_use_is_said_at_once():
    with pytest.raises(UsageError, match="no engine 'spark'; choose local or ray"):
        map_in_order(str, [1], engine="spark")
    with pytest.raises(UsageError, match="0 workers can do no work"):
        map_in_order(str, [1], num_workers=0)


def test_a_missing_ray_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # Python's own way to say that there is no such module
    with pytest.raises(UsageError, match=r"the engine ray needs Ray: pip install 'ace-step-lora\[ray\]'"):
        map_in_order(str, [1], engine="ray")


def describe(name: str) -> tuple:
    """What a worker finds out about a clip, and where it believes the caches to be."""
    return probe_audio(Path(name)), str(cache_dir()), os.getpid()


def test_ray_gives_the_same_results_the_same_exceptions_and_leaves_no_process(demo_dir, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    clips = [str(path) for path in sorted(demo_dir.glob("*.flac"))]
    items = iter([*clips * 4, str(tmp_path / "broken.wav"), *clips])
    before = set(psutil.Process().children(recursive=True))  # servers of other tests' fixtures
    results = map_in_order(describe, items, engine="ray", num_workers=2)
    found = [next(results)]
    assert len(list(copy.copy(items))) == len(clips) * 5 + 1 - LOOK_AHEAD * 2
    found += [next(results) for _ in range(len(clips) * 4 - 1)]
    local = list(map_in_order(describe, clips * 4, num_workers=2))
    assert [result[:2] for result in found] == [result[:2] for result in local]
    assert os.getpid() not in {pid for *_, pid in found}
    started = set(psutil.Process().children(recursive=True)) - before
    assert any("raylet" in process.name() for process in started)
    with pytest.raises(AudioError) as raised:
        next(results)
    assert type(raised.value) is AudioError and "it ends before its sound data" in str(raised.value)
    _, alive = psutil.wait_procs(started, timeout=10)
    assert [process.name() for process in alive] == []
