"""Replacing a directory: one writer at a time; a reader sees the old one or the new one, whoever is killed when."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from acestep_pipeline.errors import UsageError
from acestep_pipeline.files import replacing_directory


def replace(directory: Path, text: str) -> None:
    with replacing_directory(directory) as replacement, replacement() as new:
        (new / "file").write_text(text)


def content(directory: Path) -> list[tuple[str, str]]:
    return [(path.name, (path / "file").read_text()) for path in directory.parent.iterdir()]


def test_the_new_directory_takes_the_old_ones_place(tmp_path):
    for text in ("one", "two"):
        replace(tmp_path / "d", text)
        assert content(tmp_path / "d") == [("d", text)]


def test_an_error_leaves_the_old_one(tmp_path):
    replace(tmp_path / "d", "one")
    with pytest.raises(OSError, match="disk full"):
        with replacing_directory(tmp_path / "d") as replacement, replacement() as new:
            (new / "file").write_text("two")
            raise OSError("disk full")
    assert content(tmp_path / "d") == [("d", "one")]


def test_a_second_writer_is_refused(tmp_path):
    with replacing_directory(tmp_path / "d"):
        with pytest.raises(UsageError, match="another process"), replacing_directory(tmp_path / "d"):
            pass
        with replacing_directory(tmp_path / "e"):
            pass


# Dies as kill -9 does, in the call of os.replace whose number is the first argument, before or after it.
KILLED = """
import os, sys
from pathlib import Path
from acestep_pipeline.files import replacing_directory
number, after = int(sys.argv[1]), sys.argv[2] == "after"
replace, calls = os.replace, []
def dying(source, target):
    calls.append(source)
    if len(calls) == number:
        if after:
            replace(source, target)
        os.kill(os.getpid(), 9)
    replace(source, target)
os.replace = dying
with replacing_directory(Path(sys.argv[3])) as replacement, replacement() as new:
    (new / "file").write_text("two")
"""


@pytest.mark.parametrize(
    ("number", "when", "left"), [(1, "before", "one"), (1, "after", "one"), (2, "before", "one"), (2, "after", "two")]
)
def test_whoever_is_killed_when_nothing_is_lost(tmp_path, number, when, left):
    directory = tmp_path / "d"
    replace(directory, "one")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(number), when, str(directory)], env=dict(os.environ))
    assert killed.returncode == -9
    with replacing_directory(directory):
        assert content(directory) == [("d", left)]
    replace(directory, "three")
    assert content(directory) == [("d", "three")]
