"""What a job may ask for, field by field. One schema for every vendor; what it refuses is one sentence.

Needs pydantic (`[serverless]`).
"""

import difflib
import json
import re
from collections.abc import Collection, Iterable
from typing import Annotated, Any, Literal

from ..data.text.text_files import one_line
from ..errors import UsageError
from .places import Places, is_repository
from .training_flags import check_flags, training_flags

try:
    from pydantic import BaseModel, ConfigDict, Field, ValidationError
except ModuleNotFoundError:
    raise UsageError("jobs need an extra: pip install 'ace-step-lora[serverless]'.") from None

MAX_JOB_BYTES = 256 * 1024
MAX_PRESIGNED_S = 7 * 24 * 3600  # what S3 allows

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
Text = Annotated[str, Field(max_length=2000)]
Address = Annotated[str, Field(min_length=1, max_length=1000)]


class _Job(BaseModel):
    """What all jobs share: unknown fields are refused, and nothing is converted into what it was not."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    name: Name | None = Field(None, description="of the job's folder and its results; unset: the job's id")
    upload: Address | None = Field(None, description="s3://bucket/folder for the results")
    links_valid_s: int = Field(24 * 3600, ge=60, le=MAX_PRESIGNED_S, description="how long the links to them hold")


class TrainingJob(_Job):
    """Train an adapter. The same job again (same name) goes on where the last one was stopped."""

    task: Literal["train"]
    data: Address = Field(description="a folder below /data, s3://bucket/folder, or hf://datasets/owner/name")
    model: Address | None = Field(None, description="below /model, owner/name, hf://owner/name, s3://…, tiny")
    variant_dir: Name | None = Field(None, description="which DiT of an original-layout checkpoint")
    revision: Name | None = Field(None, description="of the model on the Hub")
    arguments: dict[str, Any] = Field(default_factory=dict, max_length=200, description="flags, without dashes")
    lora_config: dict[str, Any] | None = Field(None, max_length=50, description="what a LoRA JSON file would hold")
    resume: bool = Field(True, description="go on from the newest checkpoint; false: start over")
    time_limit_s: int | None = Field(None, ge=30, le=7 * 24 * 3600, description="then stop with a checkpoint")


class GenerationJob(_Job):
    """Make music with the worker's base model and adapters of its library."""

    task: Literal["generate"]
    prompt: Annotated[str, Field(min_length=1, max_length=2000)]
    lyrics: str | None = Field(None, max_length=20_000, description="unset: instrumental")
    vocal_language: Annotated[str, Field(max_length=40)] = "unknown"
    duration_s: float = Field(30.0, ge=1, le=600)
    bpm: int | None = Field(None, ge=1, le=1000)
    keyscale: str | None = Field(None, max_length=40)
    timesignature: Literal["2", "3", "4", "6"] | None = None
    adapters: dict[Name, Annotated[float, Field(ge=-2, le=2)]] = Field(
        default_factory=dict, max_length=8, description="names in the library, with weights"
    )
    seed: int = Field(0, ge=0, le=2**62)
    variations: int = Field(1, ge=1, le=16, description="of seed, seed + 1, …")
    num_inference_steps: int | None = Field(None, ge=1, le=200)
    guidance_scale: float | None = Field(None, ge=0, le=50)
    shift: float | None = Field(None, gt=0, le=20)
    format: Literal["wav", "flac", "mp3", "ogg", "opus"] = "flac"
    loudness_lufs: float | None = Field(-14.0, ge=-70, le=0, description="null: peaks at -1 dBFS")


class ValidationJob(_Job):
    """Decode and examine every track of a folder, and write the report and the dataset card."""

    task: Literal["validate_dataset"]
    data: Address
    genre_from_folder: bool = False
    min_duration_s: float = Field(2.0, ge=0, le=600)
    holdout: float = Field(0.0, ge=0, lt=1)


class ConversionJob(_Job):
    """Write an adapter for another program."""

    task: Literal["convert_adapter"]
    adapter: Address = Field(description="below /data, s3://bucket/folder, or hf://owner/name")
    to: Literal["diffusers", "peft", "comfyui"]


class DescriptionJob(_Job):
    """Say what an adapter is, and draw how strongly it changes each layer."""

    task: Literal["describe_adapter"]
    adapter: Address


Job = TrainingJob | GenerationJob | ValidationJob | ConversionJob | DescriptionJob
JOBS: dict[str, type[_Job]] = {
    job.model_fields["task"].annotation.__args__[0]: job
    for job in (TrainingJob, GenerationJob, ValidationJob, ConversionJob, DescriptionJob)
}


def parse_job(content: object, places: Places, *, tasks: Collection[str] = tuple(JOBS)) -> Job:
    """Check a job as it came in.

    Args:
        content: what JSON says.
        places: where what it names may lie.
        tasks: the only ones that this worker takes.

    Raises:
        UsageError: it can't be taken; names the field, and what was probably meant.
    """
    if not isinstance(content, dict):
        raise UsageError(f"a job must be an object with a task, one of {', '.join(tasks)}.")
    try:
        size = len(json.dumps(content))
    except (TypeError, ValueError, RecursionError):
        raise UsageError("a job must be plain JSON.") from None
    if size > MAX_JOB_BYTES:
        raise UsageError(f"a job may have {MAX_JOB_BYTES // 1024} KiB, not {size // 1024}.")
    task = content.get("task")
    if not isinstance(task, str) or task not in tasks:
        raise UsageError(f"task must be one of {', '.join(tasks)}, not {_shown(task)}{_meant(task, tasks)}.")
    try:
        job = JOBS[task].model_validate(content)
    except ValidationError as error:
        raise UsageError(_sentence(error.errors()[0], JOBS[task])) from None
    _check_places(job, places)
    return job


def _check_places(job: Job, places: Places) -> None:
    """Everything that a job names is where it may be, and a training's arguments are ones."""
    if job.upload is not None:
        places.s3_address(job.upload, "upload")
    if isinstance(job, TrainingJob):
        places.readable(job.data, "data", root=places.data, hub="hf://datasets/")
        training_model(job, places)
        check_flags(training_flags(job.arguments))
    elif isinstance(job, ValidationJob):
        places.readable(job.data, "data", root=places.data, hub="hf://datasets/")
    elif isinstance(job, ConversionJob | DescriptionJob):
        places.readable(job.adapter, "adapter", root=places.data, hub="hf://")


def training_model(job: TrainingJob, places: Places) -> str | None:
    """The base model of a training job as the training script takes it; None for the worker's own.

    Raises:
        UsageError: it is nothing that a job may name.
    """
    if job.model is None or job.model == "tiny":
        return job.model
    if is_repository(job.model) and not (places.model / job.model).exists():
        return job.model
    return places.readable(job.model, "model", root=places.model, hub="hf://").removeprefix("hf://")


def _sentence(error: dict, job: type[_Job]) -> str:
    where = ".".join(one_line(str(part))[:80] for part in error["loc"] if part != "[key]")
    if error["type"] == "extra_forbidden":
        known = job.model_fields
        return f"{where} is no field of this job{_meant(where, known) or ' (it takes ' + ', '.join(known) + ')'}."
    if error["type"] == "missing":
        return f"{where} is missing{_description(where, job)}."
    if error["type"] == "string_pattern_mismatch":
        return f"{where} may have letters, digits and . _ - and must begin with a letter or digit."
    what = re.sub(r"^Input should", "should", error["msg"])
    return f"{where} {what[0].lower()}{what[1:]}, not {_shown(error['input'])}."


def _description(field: str, job: type[_Job]) -> str:
    described = job.model_fields.get(field)
    return f": {described.description}" if described is not None and described.description else ""


def _meant(name: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


def _shown(value: object) -> str:
    return one_line(json.dumps(value, default=str))[:80]
