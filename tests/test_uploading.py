"""Runs that are published to a real S3 server while they go on, and go on from there on another machine."""

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from acestep_pipeline.cli import main
from acestep_pipeline.errors import RunError, UsageError
from acestep_pipeline.storage.publishing import find_release, publish, read_history
from acestep_pipeline.storage.release_pull import pull_release
from acestep_pipeline.storage.s3_listing import list_names
from acestep_pipeline.storage.stores import open_store
from acestep_pipeline.training.arguments import parse_args
from acestep_pipeline.training.destination import check_destination
from acestep_pipeline.training.manifest import seal
from acestep_pipeline.training.preflight import check_run
from acestep_pipeline.training.remote_checkpoints import fetch_checkpoint
from acestep_pipeline.training.run_directory import STATE_NAME, find_checkpoint
from acestep_pipeline.training.uploading import Uploads, open_uploads
from tests.loopback import listening
from tests.s3_server import SECRET_KEY, S3Server
from tests.test_interruption import PYTHON, TORCHRUN, wait_for
from tests.test_storage import content
from tests.training_runs import ROOT, SCRIPT, flags, metrics, train_here

WEIGHTS = "pytorch_lora_weights.safetensors"
SETTINGS = {"max_train_steps": 8, "checkpointing_steps": 2, "max_duration_s": 2, "max_train_samples": 2}
# Longer than it is left alone; the schedule is constant, so that a shorter end is the same run.
ENDLESS = {"max_train_steps": 5000, "checkpointing_steps": 10, "max_duration_s": 2, "max_train_samples": 2,
           "lora_dropout": 0.1, "lr_scheduler": "constant", "lr_warmup_steps": 0}  # fmt: skip


@pytest.fixture
def root(s3_folder, monkeypatch):
    monkeypatch.setenv("ACESTEP_S3_ROOT", s3_folder.url)
    return s3_folder


@pytest.fixture
def address(root) -> str:
    return f"{root.url}/lora/jazz"


@contextlib.contextmanager
def gate(server: S3Server, may_pass: Callable[[], bool | None]) -> Iterator[str]:
    """A TCP proxy before the server that holds each connection while `may_pass` says None and cuts it where False.

    Yields its URL.
    """
    target, over = ("127.0.0.1", int(server.url.rsplit(":", 1)[1])), threading.Event()

    def serve(near: socket.socket) -> None:
        with near, contextlib.suppress(OSError):
            while (passes := may_pass()) is None and not over.wait(0.05):
                pass
            if not passes:
                return
            with socket.create_connection(target) as far:
                ways = [
                    threading.Thread(target=forward, args=pair, daemon=True) for pair in ((near, far), (far, near))
                ]
                for way in ways:
                    way.start()
                for way in ways:
                    way.join()

    def forward(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if not may_pass():
                    break
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    with listening(serve) as port:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            over.set()


@pytest.fixture
def started():
    """Start the script in a session of its own; it is killed at the end."""
    processes = []

    def start(data: Path, output: Path | str, *, launcher=PYTHON, **changes) -> subprocess.Popen:
        process = subprocess.Popen(
            [*launcher, str(SCRIPT), *flags(data, output, **changes)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)},
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def published(address: str) -> list[str]:
    """The names of a run's published checkpoints, the oldest first."""
    store = open_store(f"{address}/checkpoints")
    try:
        return [release.message for release in reversed(read_history(store, find_release(store)))]
    except UsageError as error:
        assert "is not published" in str(error)
        return []


def check(data: Path, output: Path | str, **changes):
    """What the script does before it loads anything."""
    return check_run(parse_args(flags(data, output, **changes)))


def fake_checkpoint(output: Path, update: int, text: str = "state") -> Path:
    """A folder that is sealed as a checkpoint is, and a line of metrics for each update up to it."""
    folder = output / f"checkpoint-{update}"
    folder.mkdir(parents=True)
    (folder / STATE_NAME).write_text(f"{text} {update}")
    (folder / WEIGHTS).write_bytes(b"weights" * update)
    seal(folder)
    (output / "metrics.jsonl").write_text(
        "".join(f'{{"update": {n}, "loss": 0.5, "text": "{text}", "seconds": {n}.5}}\n' for n in range(1, update + 1))
    )
    return folder


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["output_dir", pytest.param("push_to_s3", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_from_s3_to_the_same_bits(where, root, demo_dir, tmp_path, started, monkeypatch):
    """On a machine that has nothing of it: no checkpoint, no latents, no music."""
    address, here = f"{root.url}/lora/jazz", tmp_path / "run"
    output, changes = (address, {}) if where == "output_dir" else (here, {"push_to_s3": "jazz"})
    monkeypatch.setenv("ACESTEP_CACHE_DIR", str(tmp_path / "machine"))
    process = started(demo_dir, output, **ENDLESS, **changes)
    wait_for(lambda: len(published(address)) >= 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shutil.rmtree(tmp_path / "machine")
    shutil.rmtree(here, ignore_errors=True)
    newest = published(address)[-1]
    root.put({f"music/{name}": data for name, data in content(demo_dir).items()})
    ends = ENDLESS | {"max_train_steps": int(newest.removeprefix("checkpoint-")) + 2}
    train_here(f"{root.url}/music", output, resume_from_checkpoint="latest", **ends, **changes)
    train_here(demo_dir, tmp_path / "alone", **ends)
    pull_release(address, tmp_path / "adapter")
    assert (tmp_path / "adapter" / WEIGHTS).read_bytes() == (tmp_path / "alone" / WEIGHTS).read_bytes()
    assert metrics(tmp_path / "adapter") == metrics(tmp_path / "alone")
    if where == "push_to_s3":
        assert not list(here.glob(".partial*")) and f"{newest}/{WEIGHTS}" in content(here)


def test_a_slow_server_holds_no_update_up(root, address, demo_dir, tmp_path, capfd, monkeypatch):
    """It answers nothing that is sent in the loop until the loop is over: if the loop waited for it, both would."""
    output = tmp_path / "run"

    def may_pass() -> bool | None:
        begun = (output / "training_args.json").exists()
        return True if not begun or len(metrics(output)) == 8 else None

    with gate(root.server, may_pass) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        train_here(demo_dir, output, push_to_s3="jazz", checkpoints_total_limit=1, **SETTINGS)
    monkeypatch.setenv("AWS_ENDPOINT_URL", root.server.url)
    said = capfd.readouterr()
    assert published(address) == ["checkpoint-2", "checkpoint-8"], "begun first, and newest when that was sent"
    assert "checkpoint-4 is not uploaded: checkpoint-6 takes its place." in said.err
    assert f"Published {address}: checkpoint-2" in said.out
    names = {name for name in content(output) if not name.startswith("checkpoint-")} - {"finished.json"}
    assert {file.file for file in find_release(open_store(address)).files} == names, "the adapter's own release"
    (output / "checkpoint-2").mkdir()  # which the limit had removed before it was sent
    assert fetch_checkpoint(tmp_path / "old", f"{address}/checkpoint-2", address=None) == str(
        tmp_path / "old/checkpoint-2"
    )
    assert len(metrics(tmp_path / "old")) == 2 and not list(output.glob(".partial*"))


def test_a_server_that_dies_leaves_a_whole_run_and_the_command_that_uploads_it(
    root, address, demo_dir, tmp_path, capfd, monkeypatch
):
    output = tmp_path / "run"

    def may_pass() -> bool:
        return not (output / "metrics.jsonl").exists() or len(metrics(output)) < 2

    with gate(root.server, may_pass) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(RunError) as failed:
            train_here(demo_dir, output, push_to_s3="jazz", **SETTINGS)
    monkeypatch.setenv("AWS_ENDPOINT_URL", root.server.url)
    sentence = str(failed.value)
    assert f"not uploaded to {address}: checkpoint-2, " in sentence and "the adapter: " in sentence
    assert f"The local copy is complete, in {output}; upload it with: acestep-lora storage push " in sentence
    assert len(metrics(output)) == 8 and find_checkpoint(output, "latest") == output / "checkpoint-8"
    assert "warning: checkpoint-2 is not uploaded: " in capfd.readouterr().err
    for command in sentence.partition("upload it with: ")[2].split(" && "):
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(command)[1:])
        assert ended.value.code == 0
    assert WEIGHTS in list_names(address)
    found = fetch_checkpoint(tmp_path / "elsewhere", f"{address}/latest", address=None)
    assert content(Path(found)) == content(output / "checkpoint-8")


def test_a_run_that_is_told_to_stop_sends_its_checkpoint(root, address, demo_dir, tmp_path, started):
    """And leaves no secret anywhere."""
    process = started(demo_dir, tmp_path / "run", push_to_s3="jazz", **ENDLESS | {"checkpointing_steps": 5000})
    wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists() and len(metrics(tmp_path / "run")) >= 2, process)
    process.send_signal(signal.SIGTERM)
    log, _ = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGTERM, log
    done = len(metrics(tmp_path / "run"))
    assert published(address) == [f"checkpoint-{done}"] and f"after update {done} of 5000" in log
    left = b"".join(content(tmp_path / "run").values())
    stored = open_store(address)
    sent = b"".join(stored.read(each.key, max_bytes=10**8)[0] for each in stored.list_keys())
    assert SECRET_KEY.encode() not in left + sent and SECRET_KEY not in log


@pytest.mark.slow
def test_two_processes_go_on_from_s3_and_the_first_publishes(root, address, demo_dir, tmp_path, started):
    ends = SETTINGS | {"effective_batch_size": 2, "max_train_samples": 4}
    train_here(demo_dir, tmp_path / "alone", **ends)
    train_here(demo_dir, tmp_path / "first", push_to_s3="jazz", **ends | {"max_train_steps": 4})
    process = started(demo_dir, tmp_path / "run", launcher=TORCHRUN, push_to_s3="jazz",
                      resume_from_checkpoint="latest", **ends)  # fmt: skip
    log, _ = process.communicate(timeout=600)
    assert process.returncode == 0, log
    assert "Resuming from" in log and log.count(f"Published {address}") == 1
    assert published(address)[-1] == "checkpoint-8" and find_release(open_store(address)).release == 2


# --- refused before anything is loaded -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "changes", "said"),
    [
        ({}, {"push_to_s3": "my jazz"}, r"'lora/my jazz' is no name to publish under"),
        ({}, {"push_to_s3": "s3://k:canary@bucket/x"}, r"is not an address; write s3://bucket/folder"),
        ({}, {"push_to_s3": "jazz", "output_dir": "s3://b/x"}, r"both say where to publish; give one of them"),
        ({}, {"output_dir": "s3://no-such-bucket/x"}, r"no-such-bucket/x: there is no such bucket"),
        ({"ACESTEP_S3_ROOT": None}, {"push_to_s3": "jazz"}, r"ACESTEP_S3_ROOT is not set"),
        ({"AWS_SECRET_ACCESS_KEY": "canary"}, {"push_to_s3": "jazz"}, r"the credentials are wrong"),
        ({"AWS_ACCESS_KEY_ID": None}, {"push_to_s3": "jazz"}, r"no credentials"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, {"push_to_s3": "jazz"}, r"http://127.0.0.1:1 can't be reached"),
        ({}, {"push_to_s3": "taken"}, r"taken is published already .*--resume_from_checkpoint latest, .* another"),
        ({}, {"push_to_s3": "going"}, r"going/checkpoints is published already"),
        ({}, {"push_to_s3": "files"}, r"holds files that were not published \(song.wav\)"),
        ({}, {"push_to_s3": "jazz", "upload_timeout_s": 0}, r"--upload_timeout_s must be positive"),
        ({}, {"resume_from_checkpoint": "s3://bucket/x"}, r"names no checkpoint; write s3://…/latest"),
        ({}, {"resume_from_checkpoint": "s3://k:canary@b/latest"}, r"is not an address"),
    ],
)
def test_what_can_not_be_published_is_refused_at_once(
    environment, changes, said, root, demo_dir, tmp_path, monkeypatch
):
    checkpoint = fake_checkpoint(tmp_path / "other", 2).parent
    publish(checkpoint, f"{root.url}/lora/taken", show_progress=False, include_checkpoints=True)
    publish(checkpoint, f"{root.url}/lora/going/checkpoints", show_progress=False, include_checkpoints=True)
    root.put({"lora/files/song.wav": b"x"})
    for name, value in environment.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=said) as refused:
        check(demo_dir, changes.pop("output_dir", tmp_path / "run"), **changes)
    assert "canary" not in str(refused.value) and not (tmp_path / "run").exists()


def test_a_name_that_is_taken_can_be_added_to(root, address, demo_dir, tmp_path):
    publish(fake_checkpoint(tmp_path / "other", 2).parent, address, show_progress=False, include_checkpoints=True)
    _, checkpoint, _ = check(demo_dir, tmp_path / "run", push_to_s3="jazz", overwrite_output_dir=True)
    assert checkpoint is None
    _, checkpoint, _ = check(demo_dir, tmp_path / "run", push_to_s3="jazz", resume_from_checkpoint="latest")
    assert checkpoint == tmp_path / "run" / "checkpoint-2"


def test_a_shared_folder_will_do(tmp_path, monkeypatch, demo_dir):
    monkeypatch.setenv("ACESTEP_S3_ROOT", str(tmp_path / "disk"))
    *_, uploads = check(demo_dir, tmp_path / "run", push_to_s3="loo-subsets/a")
    uploads.add_checkpoint(fake_checkpoint(tmp_path / "run", 3))
    assert uploads.finish(60) is None
    assert published(str(tmp_path / "disk/lora/loo-subsets/a")) == ["checkpoint-3"]


# --- the queue -------------------------------------------------------------------------------------------------------


def test_waiting_ends_and_nothing_of_it_stays(root, address, tmp_path, monkeypatch):
    """A server that takes requests and answers none."""
    uploads = Uploads(address, tmp_path, releases=check_destination(address, may_exist=False))
    with gate(root.server, lambda: None) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        uploads.add_checkpoint(fake_checkpoint(tmp_path, 1))
        wait_for(lambda: any("training.sending" in " ".join(child.cmdline()) for child in psutil.Process().children()))
        uploads.add_checkpoint(fake_checkpoint(tmp_path, 2))
        sentence = uploads.finish(0.5)
    assert "checkpoint-1, checkpoint-2: it was not sent within 0.5 s. The local copy is complete" in sentence
    assert sentence.endswith(f"storage push {tmp_path} {address}/checkpoints --include_checkpoints")
    monkeypatch.setenv("AWS_ENDPOINT_URL", root.server.url)
    assert not list(tmp_path.glob(".partial*")) and published(address) == []
    wait_for(lambda: not any("training.sending" in " ".join(child.cmdline()) for child in psutil.Process().children()))


def test_what_sends_ends_with_the_run(root, address, tmp_path, monkeypatch):
    """Or it would publish after a run that was started again, and be taken for another's."""
    fake_checkpoint(tmp_path, 1)
    code = f"""
import time
from pathlib import Path
from acestep_pipeline.training.uploading import Uploads
Uploads({address!r}, Path({str(tmp_path)!r})).add_checkpoint(Path({str(tmp_path)!r}, "checkpoint-1"))
time.sleep(600)
"""
    with gate(root.server, lambda: None) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        run = subprocess.Popen([sys.executable, "-c", code])
        wait_for(lambda: psutil.Process(run.pid).children())
        (sender,) = psutil.Process(run.pid).children()
        run.kill()
        run.wait()
        wait_for(lambda: not sender.is_running())


def test_a_run_that_fails_sends_its_checkpoint_before_it_ends(root, address, tmp_path, monkeypatch):
    fake_checkpoint(tmp_path, 1)
    code = f"""
from pathlib import Path
from acestep_pipeline.errors import RunError, one_sentence_errors
from acestep_pipeline.training.uploading import Uploads
with one_sentence_errors(debug=False):
    Uploads({address!r}, Path({str(tmp_path)!r})).add_checkpoint(Path({str(tmp_path)!r}, "checkpoint-1"))
    raise RunError("it failed.")
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert (
        run.returncode == 1 and run.stderr.startswith("error: it failed.") and published(address) == ["checkpoint-1"]
    )


def test_another_run_at_the_same_name_is_noticed(root, address, tmp_path):
    mine, theirs = (Uploads(address, tmp_path / name, releases={"checkpoints": 0}) for name in ("mine", "theirs"))
    theirs.add_checkpoint(fake_checkpoint(tmp_path / "theirs", 1))
    assert theirs.finish(60) is None
    mine.add_checkpoint(fake_checkpoint(tmp_path / "mine", 2))
    assert "another publisher published release 1 meanwhile" in mine.finish(60)
    assert published(address) == ["checkpoint-1"]


def test_a_newer_checkpoint_makes_up_for_one_that_failed(root, address, tmp_path, monkeypatch, capfd):
    uploads = Uploads(address, tmp_path, releases=check_destination(address, may_exist=False))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    uploads.add_checkpoint(fake_checkpoint(tmp_path, 1))
    said = ""
    while "checkpoint-1 is not uploaded" not in said:
        said += capfd.readouterr().err
    monkeypatch.setenv("AWS_ENDPOINT_URL", root.server.url)
    uploads.add_checkpoint(fake_checkpoint(tmp_path, 2))
    assert uploads.finish(60) is None and published(address) == ["checkpoint-2"]


def test_only_the_first_process_publishes(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    uploads = open_uploads("s3://nowhere/x", tmp_path, may_exist=False)
    uploads.add_checkpoint(tmp_path / "checkpoint-1")
    uploads.add_adapter()
    assert uploads.finish(1) is None and uploads.address is None


# --- checkpoints from elsewhere --------------------------------------------------------------------------------------


def test_the_newest_checkpoint_of_here_and_there_counts(root, address, tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    uploads = Uploads(address, there, releases=check_destination(address, may_exist=False))
    uploads.add_checkpoint(fake_checkpoint(there, 2))
    assert uploads.finish(60) is None
    assert fetch_checkpoint(here, "latest", address=address) == str(here / "checkpoint-2")
    assert {name for name in content(here) if ".partial" not in name} == {
        f"checkpoint-2/{name}" for name in (STATE_NAME, WEIGHTS, "manifest.json")
    } | {"metrics.jsonl"}
    fake_checkpoint(here, 4)
    assert fetch_checkpoint(here, "latest", address=address) == "latest", "what is here is newer"
    assert fetch_checkpoint(here, "latest", address=None) == "latest"
    (here / "checkpoint-4" / WEIGHTS).write_bytes(b"damaged")
    (here / "checkpoint-2" / WEIGHTS).write_bytes(b"damaged")
    assert find_checkpoint(here, fetch_checkpoint(here, "latest", address=address)) == here / "checkpoint-2"
    assert fetch_checkpoint(tmp_path / "new", "latest", address=f"{root.url}/lora/none") == "latest"
    with pytest.raises(UsageError, match="no such checkpoint is published there"):
        fetch_checkpoint(here, f"{address}/checkpoint-3", address=None)
    with pytest.raises(UsageError, match="no such checkpoint is published there"):
        fetch_checkpoint(here, f"{root.url}/lora/none/latest", address=None)


def test_another_runs_directory_is_left_alone(root, address, tmp_path):
    uploads = Uploads(address, tmp_path / "there", releases=check_destination(address, may_exist=False))
    uploads.add_checkpoint(fake_checkpoint(tmp_path / "there", 2))
    assert uploads.finish(60) is None
    fake_checkpoint(tmp_path / "here", 1, "another run's")
    before = content(tmp_path / "here")
    with pytest.raises(UsageError, match="holds another run than .*; name another --output_dir"):
        fetch_checkpoint(tmp_path / "here", f"{address}/latest", address=None)
    assert {name: data for name, data in content(tmp_path / "here").items() if ".partial" not in name} == before


def test_processes_of_a_machine_fetch_it_once(root, address, tmp_path):
    uploads = Uploads(address, tmp_path / "there", releases=check_destination(address, may_exist=False))
    uploads.add_checkpoint(fake_checkpoint(tmp_path / "there", 2))
    assert uploads.finish(60) is None
    code = f"""
from pathlib import Path
from acestep_pipeline.training.remote_checkpoints import fetch_checkpoint
print(fetch_checkpoint(Path({str(tmp_path / "here")!r}), {f"{address}/latest"!r}, address=None))
"""
    command, environment = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert {each.communicate()[0].strip() for each in started} == {str(tmp_path / "here/checkpoint-2")}
    assert find_checkpoint(tmp_path / "here", "latest") == tmp_path / "here/checkpoint-2"


def test_a_run_that_starts_over_is_not_resumed_from_the_old_ones_checkpoint(root, address, tmp_path):
    uploads = Uploads(address, tmp_path / "old", releases=check_destination(address, may_exist=False))
    uploads.add_checkpoint(fake_checkpoint(tmp_path / "old", 9))
    assert uploads.finish(60) is None
    uploads = open_uploads(address, tmp_path / "new", may_exist=True)
    uploads.start_over()
    assert uploads.finish(60) is None
    assert fetch_checkpoint(tmp_path / "elsewhere", "latest", address=address) == "latest"
    found = fetch_checkpoint(tmp_path / "elsewhere", f"{address}/checkpoint-9", address=None)
    assert found == str(tmp_path / "elsewhere/checkpoint-9"), "history only grows"
