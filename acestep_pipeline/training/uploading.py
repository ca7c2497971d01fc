"""A run's checkpoints and its adapter on S3, sent while training goes on.

The adapter becomes a release (`storage.publishing`) at the run's address. Each checkpoint becomes a release at
`<address>/checkpoints`, of what a resume on another machine needs: `checkpoint-<update>/` and the metrics up to it.

The training process only links a checkpoint's files aside, which takes no longer for large ones, and a thread of it
waits for the process that publishes them: hashing and sending share neither Python's lock nor a core with an update
that needs it, and what hangs can be killed. While one checkpoint is sent one more may wait; a newer one takes its
place. Nothing here imports torch.
"""

import atexit
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..progress import progress_bar
from ..storage.release_manifest import CHECKPOINTS_FOLDER
from ..storage.s3 import shown
from . import sending
from .destination import check_destination, join_address
from .launch import is_first_process
from .run_directory import METRICS_NAME, VALIDATION_NAME, partial_name

# How long a run that was told to stop, or that failed, goes on to send its last checkpoint.
STOP_GRACE_S = 60.0
_SOURCE = Path(__file__).resolve().parents[2]
# Of what the sending process says: more than its progress bar or a traceback.
_MAX_SAID_BYTES = 1 << 14


def open_uploads(address: str | None, output_dir: Path, *, may_exist: bool) -> "Uploads":
    """What publishes a run at an address (None: nowhere), which is checked by the process that will use it: the first.

    Raises as `check_destination` does.
    """
    if address is None or not is_first_process():
        return Uploads(None, output_dir)
    return Uploads(address, output_dir, releases=check_destination(address, may_exist=may_exist))


@dataclass(frozen=True)
class Publication:
    """What is to be published: its name for people, the folder it lies in, and where below the run's address to.

    `staged`: the folder is a copy, removed once it is published or given up.
    """

    name: str
    directory: Path
    folder: str
    staged: bool


class Uploads:
    """Publishes one run's checkpoints and adapter; without an address (and on all processes but one) nothing.

    Make it and call it in the main thread. Nothing but `finish` waits. If the run ends otherwise, as by an error, the
    checkpoint that is still on its way gets `STOP_GRACE_S` at the interpreter's end.
    """

    def __init__(self, address: str | None, output_dir: Path, *, releases: Mapping[str, int] | None = None) -> None:
        """Take where to publish and what `check_destination` found there."""
        self.address, self.output_dir = address, Path(output_dir)
        self._releases = dict(releases or {})
        self._waiting: deque[Publication] = deque()
        self._failures: dict[str, str] = {}  # by the publication's name
        self._sent: list[str] = []
        self._is_over = False
        self._running: Publication | None = None
        self._process: subprocess.Popen | None = None
        self._said = b""
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def add_checkpoint(self, checkpoint: Path) -> None:
        """Send a complete checkpoint and the metrics up to it, in the background.

        It may be removed meanwhile: its files are linked (or, where a file system has no links, copied) aside first.
        Of several that wait only the newest is sent; an older one that was not begun yet is left out.
        """
        if self.address is None:
            return
        staged = partial_name(checkpoint).with_name(f"{partial_name(checkpoint).name}-upload")
        try:
            _stage(checkpoint, self.output_dir, staged)
        except OSError as error:  # such as a full disk: the run itself can go on
            shutil.rmtree(staged, ignore_errors=True)
            self._fail(checkpoint.name, f"it can't be set aside for sending ({error.strerror or error})")
            return
        self._add(Publication(checkpoint.name, staged, CHECKPOINTS_FOLDER, staged=True))

    def start_over(self) -> None:
        """Where a run starts over that has checkpoints there: have none be taken for this run's."""
        if self.address is None or not self._releases.get(CHECKPOINTS_FOLDER):
            return
        staged = self.output_dir / f"{partial_name(Path('checkpoint-0')).name}-upload"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        (staged / METRICS_NAME).touch()
        self._add(Publication("the start", staged, CHECKPOINTS_FOLDER, staged=True))

    def add_adapter(self) -> None:
        """Send what the output directory holds at the end of a run, before a checkpoint that still waits."""
        if self.address is not None:
            self._add(Publication("the adapter", self.output_dir, "", staged=False))

    def finish(self, timeout_s: float) -> str | None:
        """Wait until all is sent, at most so many seconds, and give up what then is not.

        Returns:
            None if everything of this run is published; else a sentence: what is not, why, and how to publish it.
        """
        atexit.unregister(self._at_exit)
        with self._changed:
            if self.is_busy():
                self._wait(time.monotonic() + timeout_s)
            for publication in [each for each in (self._running, *self._waiting) if each]:
                self._failures[publication.name] = f"it was not sent within {timeout_s:g} s"
                if publication.staged:
                    shutil.rmtree(publication.directory, ignore_errors=True)
            self._waiting.clear()
            self._is_over = True
            if self._process is not None:
                self._process.kill()
            self._changed.notify_all()
            failures = self._describe_failures()
            if self._sent and not failures:
                where = shown(self.address)
                print(
                    f"Published {where}: {', '.join(self._sent)}. Next: acestep-lora storage ls {shlex.quote(where)}"
                )
            return failures

    # ------------------------------------------------------------------------------------------------- main thread

    def _add(self, publication: Publication) -> None:
        with self._changed:
            if publication.staged:
                for older in [waiting for waiting in self._waiting if waiting.staged]:
                    self._waiting.remove(older)
                    tqdm.write(f"{older.name} is not uploaded: {publication.name} takes its place.", file=sys.stderr)
                    shutil.rmtree(older.directory, ignore_errors=True)
                self._waiting.append(publication)
            else:
                self._waiting.appendleft(publication)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
                self._thread.start()
                atexit.register(self._at_exit)
            self._changed.notify_all()

    def is_busy(self) -> bool:
        """Whether something is being sent, or waits."""
        return bool(self._waiting or self._running)

    def _wait(self, deadline: float) -> None:
        """Draw what the sending process says of its progress until there is nothing left to send."""
        with progress_bar(total=None, bar_format="{desc}", leave=False) as bar:
            while self.is_busy() and time.monotonic() < deadline:
                names = [each.name for each in (self._running, *self._waiting) if each]
                left = max(0.0, deadline - time.monotonic())
                said = self._said.decode(errors="replace").replace("\r", "\n").strip().rpartition("\n")[2]
                bar.set_description_str(f"Uploading {', then '.join(names)} (at most {left:.0f} s more) {said}", False)
                bar.update()
                self._changed.wait(min(0.2, left))

    def _at_exit(self) -> None:
        if sentence := self.finish(STOP_GRACE_S):
            print(f"warning: {sentence}", file=sys.stderr, flush=True)

    def _describe_failures(self) -> str | None:
        if not self._failures:
            return None
        reasons: dict[str, list[str]] = {}
        for name, reason in self._failures.items():
            reasons.setdefault(reason.rstrip("."), []).append(name)
        described = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
        where = shlex.quote(str(self.output_dir))
        command = []
        if "the adapter" in self._failures:
            force = " --force" if self._releases.get("") else ""
            command.append(f"acestep-lora storage push {where} {shlex.quote(self.address)}{force}")
        if self._failures.keys() - {"the adapter"}:
            place = shlex.quote(join_address(self.address, CHECKPOINTS_FOLDER))
            force = " --force" if self._releases.get(CHECKPOINTS_FOLDER) else ""
            command.append(f"acestep-lora storage push {where} {place} --include_checkpoints{force}")
        return (
            f"not uploaded to {shown(self.address)}: {described}. The local copy is complete, in {self.output_dir}; "
            f"upload it with: {' && '.join(command)}"
        )

    # -------------------------------------------------------------------------------------------------- the thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_over)
                if self._is_over:
                    return
                self._running = publication = self._waiting.popleft()
                self._said = b""
            outcome = self._publish(publication)
            with self._changed:
                if self._is_over:
                    return
                if "release" in outcome:
                    self._releases[publication.folder] = outcome["release"]
                    self._sent.append(publication.name)
                    if publication.staged:  # an older checkpoint that failed is no longer missed
                        self._failures.clear()
                else:
                    self._fail(publication.name, outcome["error"])
                if publication.staged:
                    shutil.rmtree(publication.directory, ignore_errors=True)
                self._running = None
                self._changed.notify_all()

    def _fail(self, name: str, reason: str) -> None:
        self._failures[name] = reason
        tqdm.write(f"warning: {name} is not uploaded: {reason}", file=sys.stderr)

    def _publish(self, publication: Publication) -> dict:
        """Publish in a process of its own; returns its outcome: `release`, the number, or `error`, a sentence."""
        job = {
            "directory": str(publication.directory),
            "address": join_address(self.address, publication.folder),
            "message": publication.name if publication.staged else None,
            "follows": self._releases.get(publication.folder, 0),
            "include_checkpoints": publication.staged,
        }
        path = os.pathsep.join(filter(None, (str(_SOURCE), os.environ.get("PYTHONPATH"))))
        process = subprocess.Popen(
            [sys.executable, "-m", sending.__name__, json.dumps(job)],
            stdin=subprocess.PIPE,  # its end tells that this process is gone
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
            process_group=0,  # a signal to the run's group is for the run to heed
        )
        with process:
            with self._changed:
                self._process = process
                if self._is_over:
                    process.kill()
            while part := process.stderr.read1():
                self._said = (self._said + part)[-_MAX_SAID_BYTES:]
            answer = process.stdout.read()
        with self._changed:
            self._process = None
        try:
            return json.loads(answer)
        except ValueError:
            if not self._is_over:
                tqdm.write(self._said.decode(errors="replace"), file=sys.stderr)
            return {"error": f"the process that sends it ended with status {process.returncode}"}


def _stage(checkpoint: Path, output_dir: Path, staged: Path) -> None:
    """Give a checkpoint's files, which are never written to again, second names; copy the metrics, which are."""
    shutil.rmtree(staged, ignore_errors=True)
    (staged / checkpoint.name).mkdir(parents=True)
    for file in checkpoint.iterdir():
        target = staged / checkpoint.name / file.name
        try:
            os.link(file, target)
        except OSError:
            shutil.copyfile(file, target)
    for name in (METRICS_NAME, VALIDATION_NAME):
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(output_dir / name, staged / name)
