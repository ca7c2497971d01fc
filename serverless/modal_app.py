"""Training and generation on Modal: `modal deploy serverless/modal_app.py`.

    train = modal.Function.from_name("acestep-lora", "train")
    train.spawn({"task": "train", "name": "jazz", "data": "s3://bucket/music", "upload": "s3://bucket/lora/jazz"})
    music = modal.Cls.from_name("acestep-lora", "Music")()
    for event in music.generate.remote_gen({"task": "generate", "prompt": "blues", "adapters": {"jazz": 1.0}}): ...

Jobs are those of `acestep_pipeline/jobs/schema.py`. Where it is deployed from, ACESTEP_MODAL_IMAGE names the container
image in its registry (ACESTEP_MODAL_REGISTRY: Modal's secret that opens it), ACESTEP_MODAL_TRAIN_GPU (H100) and
ACESTEP_MODAL_GENERATE_GPU (L40S) the GPUs. Credentials are in the secret `acestep-lora` (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, ACESTEP_S3_ROOT, HF_TOKEN, …). Runs lie in the volume `acestep-lora-output`.
"""

import json
import os
import time
from pathlib import Path

import modal

from acestep_pipeline.errors import RunError, UsageError
from acestep_pipeline.jobs.gpu_names import check_gpu
from acestep_pipeline.jobs.results import without_links
from acestep_pipeline.jobs.worker import Worker, sentence

TRAIN_GPU = check_gpu("modal", os.environ.get("ACESTEP_MODAL_TRAIN_GPU") or "H100")
GENERATE_GPU = check_gpu("modal", os.environ.get("ACESTEP_MODAL_GENERATE_GPU") or "L40S")
# Modal ends a function after a day at the latest. A training stops before that, with a checkpoint, and the next try
# goes on from there, as it does after a machine was taken away.
TIMEOUT_S, MARGIN_S, TRIES = 24 * 3600, 900, 10
# How often what a training has written so far is made to outlive its machine.
COMMIT_INTERVAL_S = 120


def container_image() -> modal.Image:
    """The project's own image as it is: Modal starts functions in it itself, and brings its client along.

    Raises:
        UsageError: it is not said where it lies.
    """
    address = os.environ.get("ACESTEP_MODAL_IMAGE")
    if not address and modal.is_local():
        raise UsageError("ACESTEP_MODAL_IMAGE must name the image in its registry, such as ghcr.io/me/acestep-lora:1.")
    secret = os.environ.get("ACESTEP_MODAL_REGISTRY")
    opens = modal.Secret.from_name(secret) if secret else None
    # On Modal this module is imported again, where the image is chosen already.
    return modal.Image.from_registry(address or "chosen", secret=opens).entrypoint([])


image = container_image()
output = modal.Volume.from_name("acestep-lora-output", create_if_missing=True)
cache = modal.Volume.from_name("acestep-lora-cache", create_if_missing=True)
options = {
    "image": image,
    "volumes": {"/output": output, "/cache": cache},
    "secrets": [modal.Secret.from_name("acestep-lora")],
}
app = modal.App("acestep-lora")


@app.function(
    gpu=TRAIN_GPU, timeout=TIMEOUT_S, retries=modal.Retries(max_retries=TRIES, initial_delay=10.0), **options
)
def train(job: dict) -> dict:
    """Train; returns the result. What went before in the folder of the same name goes on.

    Raises:
        RunError: it failed, or time was up: Modal tries again, up to ten times.
    """
    committed = time.monotonic()

    def emit(event: dict) -> None:
        nonlocal committed
        print(json.dumps(event), flush=True)
        if time.monotonic() - committed > COMMIT_INTERVAL_S:
            _commit()
            committed = time.monotonic()

    limit_s = TIMEOUT_S - MARGIN_S
    own_limit_s = job.get("time_limit_s") if isinstance(job, dict) else None
    job = job | {"time_limit_s": limit_s} if isinstance(job, dict) and own_limit_s is None else job
    result: dict = {}
    try:
        for event in Worker(tasks=("train",)).stream(job, job_id=modal.current_function_call_id() or "job"):
            if event["event"] == "result":
                result = event
            else:
                emit(event)
    except UsageError as error:
        return _refused(error)  # another try would be refused, too
    finally:
        _commit()
    print(json.dumps(without_links(result)), flush=True)
    if result["status"] == "stopped" and own_limit_s is None:
        raise RunError(f"stopped after update {result['update']}; the next try goes on from there.")
    return result


@app.cls(gpu=GENERATE_GPU, timeout=3600, scaledown_window=300, **options)
class Music:
    """Keeps the base model on the GPU, and the adapters that were used last."""

    @modal.enter()
    def load(self) -> None:
        """Load the base model before the first job."""
        self.worker = Worker(tasks=("generate",))
        self.worker.generator()

    @modal.method()
    def generate(self, job: dict):
        """Make music; yields events, the result last."""
        if not modal.is_local():
            output.reload()  # adapters that were trained meanwhile
        try:
            yield from self.worker.stream(job, job_id=modal.current_input_id() or "job")
        except (UsageError, RunError) as error:
            yield {"event": "result"} | _refused(error)


def _refused(error: Exception) -> dict:
    said = {"status": "refused" if isinstance(error, UsageError) else "failed", "error": sentence(error)}
    print(json.dumps(said), flush=True)
    return said


def _commit() -> None:
    """Make the volume's new files outlive this machine."""
    if not modal.is_local():
        output.commit()


@app.local_entrypoint()
def main(job: str) -> None:
    """`modal run serverless/modal_app.py --job job.json`: do one job, and print its result without links."""
    content = json.loads(Path(job).read_text("utf-8"))
    if content.get("task") == "train":
        print(json.dumps(without_links(train.remote(content)), indent=1))
    else:
        for event in Music().generate.remote_gen(content):
            print(json.dumps(without_links(event)))
