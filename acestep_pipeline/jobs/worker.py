"""What every vendor's handler calls: one job in, events on the way, one result out."""

import asyncio
import os
import queue
import re
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

from ..errors import RunError, UsageError
from .places import Places
from .results import check_can_publish, inline_results, publish_results
from .schema import JOBS, ConversionJob, DescriptionJob, GenerationJob, TrainingJob, ValidationJob, parse_job

FILE_TASKS = ("validate_dataset", "convert_adapter", "describe_adapter")


class Worker:
    """One worker: its folders, and its base model once a generation job has asked for it."""

    def __init__(self, places: Places | None = None, *, tasks: tuple[str, ...] = tuple(JOBS)) -> None:
        """Args:
        places: its folders; None: as the environment says.
        tasks: the only ones that it takes.
        """
        self.places = places or Places.from_environment()
        self._tasks = tasks
        self._generator = None
        self._lock = threading.Lock()

    def run(
        self,
        content: object,
        *,
        job_id: str = "job",
        emit: Callable[[dict], None] = lambda event: None,
        stop: threading.Event | None = None,
    ) -> dict:
        """Do one job.

        Args:
            content: the job, as `schema` describes it.
            job_id: the vendor's; names what the job doesn't name.
            emit: called with each event, JSON-ready, from this thread or another.
            stop: set it to have the job end in order.

        Returns:
            The result, JSON-ready: `status` (done or stopped), `task`, and what the job made.

        Raises:
            UsageError: the job can't be taken.
            RunError: it failed.
        """
        stop = stop or threading.Event()
        job = parse_job(content, self.places, tasks=self._tasks)
        job_id = re.sub(r"[^A-Za-z0-9._-]", "-", job_id).lstrip(".-_")[:100] or "job"
        if isinstance(job, TrainingJob):
            from .train_job import run_training

            self.release()  # the training needs the GPU's memory
            return run_training(job, self.places, job_id=job_id, emit=emit, stop=stop)
        return self._make_files(job, job_id, emit, stop)

    def stream(self, content: object, *, job_id: str = "job", stop: threading.Event | None = None) -> Iterator[dict]:
        """`run` as events one after another; the last is `{"event": "result", …}`. Closing it stops the job.

        Raises as `run`.
        """
        stop = stop or threading.Event()
        events: queue.Queue = queue.Queue()
        thread = threading.Thread(target=self._run_into, args=(events.put, content, job_id, stop), daemon=True)
        thread.start()
        try:
            while (event := events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            stop.set()
            thread.join()

    async def stream_async(self, content: object, *, job_id: str, stop: threading.Event) -> AsyncIterator[dict]:
        """`stream` for an event loop, which is never held up; cancelling it stops the job and waits for its end."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def put(event: object) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        thread = threading.Thread(target=self._run_into, args=(put, content, job_id, stop), daemon=True)
        thread.start()
        try:
            while (event := await events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            stop.set()
            while thread.is_alive():
                await asyncio.sleep(0.05)

    def _run_into(self, put: Callable, content: object, job_id: str, stop: threading.Event) -> None:
        try:
            put({"event": "result", **self.run(content, job_id=job_id, emit=put, stop=stop)})
        except Exception as error:  # raised again where the events are read
            put(error)
        put(None)

    def generator(self):
        """The base model in memory, loaded at the first call."""
        from .generate_job import Generator

        with self._lock:
            if self._generator is None:
                self._generator = Generator(adapters=self.places.adapters)
            return self._generator

    def release(self) -> None:
        """Let go of the base model, and of the GPU's memory that it takes."""
        with self._lock:
            if self._generator is None:
                return
            self._generator = None
        import gc

        import torch

        gc.collect()
        torch.cuda.empty_cache()

    def _make_files(self, job, job_id: str, emit: Callable[[dict], None], stop: threading.Event) -> dict:
        """A job whose results are files: made in a folder of its own, published or handed back, and removed."""
        if job.upload is not None:
            check_can_publish(job.upload)
        name = job.name or job_id
        top = self.places.output / ".jobs"
        try:
            top.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=top))
        except OSError as error:
            raise UsageError(f"{top} can't be written ({error.strerror}); mount a folder there.") from None
        try:
            result = {"status": "done", "task": job.task, "name": name}
            result |= self._do(job, scratch / "files", emit, stop)
            if job.upload is not None:
                emit({"event": "uploading"})
                result["results"] = publish_results(scratch / "files", job.upload, valid_s=job.links_valid_s)
            else:
                result["results"] = inline_results(scratch / "files")
            return result
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _do(self, job, directory: Path, emit: Callable[[dict], None], stop: threading.Event) -> dict:
        from . import file_jobs

        if isinstance(job, GenerationJob):
            was_cold = self._generator is None
            generator = self.generator()
            loading = {"load_s": generator.load_s, "cold_start_s": since_start_s()} if was_cold else {}
            emit({"event": "loaded", **loading})
            return generator.generate(job, directory, emit=emit, stop=stop) | loading
        emit({"event": "started", "name": directory.parent.name})
        if isinstance(job, ValidationJob):
            return file_jobs.validate_dataset(job, self.places, directory)
        if isinstance(job, ConversionJob):
            return file_jobs.convert_adapter(job, self.places, directory)
        assert isinstance(job, DescriptionJob)
        return file_jobs.describe_adapter(job, self.places, directory)


def since_start_s() -> float:
    """Seconds since this process was started."""
    import psutil

    return round(time.time() - psutil.Process(os.getpid()).create_time(), 3)


def sentence(error: Exception) -> str:
    """What is said of a job that failed. A defect of ours is named by its kind alone: its text may hold anything."""
    if isinstance(error, UsageError | RunError):
        return " ".join(str(error).split())
    return f"the job failed with {type(error).__name__}; the worker's log has more."
