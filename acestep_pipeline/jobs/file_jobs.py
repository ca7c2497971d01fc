"""Jobs that need neither a GPU nor long: examine a dataset, convert an adapter, describe one."""

from pathlib import Path

from ..errors import UsageError
from ..files import write_text
from ..paths import free_space_bytes
from ..storage.copies import is_remote
from ..storage.hub_address import parse_hub_address
from ..storage.s3_listing import list_objects
from .places import Places
from .schema import ConversionJob, DescriptionJob, ValidationJob

# Of the disk's free space, how much a job's input may take: the working copy and the results need room too.
INPUT_SHARE = 0.5
MAX_NAMED = 50


def check_size(address: str, disk: Path) -> None:
    """Refuse what is too large for this worker's disk, before it is fetched.

    Raises:
        UsageError: it is, or there is no such place.
    """
    from ..storage.hub_pull import list_repository  # with huggingface_hub

    if is_remote(address) or address.startswith("hf://datasets/"):
        files = list_objects(address) if is_remote(address) else list_repository(parse_hub_address(address)).files
        size, room = sum(file.size for file in files), free_space_bytes(disk) * INPUT_SHARE
        if size > room:
            raise UsageError(f"{address} has {size / 1e9:.2f} GB, and this worker takes {room / 1e9:.2f} GB.")


def validate_dataset(job: ValidationJob, places: Places, directory: Path) -> dict:
    """Decode every track and write `report.html`, `report.json` and `dataset_card.md` into `directory`.

    Raises:
        UsageError: the folder can't be read, or holds no usable track.
    """
    from ..data.building.build_report import CARD_NAME, PAGE_NAME, REPORT_NAME, BuildOptions
    from ..data.building.ingest import build_dataset

    data = places.readable(job.data, "data", root=places.data, hub="hf://datasets/")
    check_size(data, directory)
    options = BuildOptions(
        validate_audio=True,
        genre_from_folder=job.genre_from_folder,
        min_duration_s=job.min_duration_s,
        holdout=job.holdout,
        link=True,  # it is to be examined: no copy of the music is needed
    )
    built = directory.with_name(f"{directory.name}-built")
    report = build_dataset([data], built, options, show_progress=False)
    directory.mkdir(parents=True, exist_ok=True)
    for name in (PAGE_NAME, REPORT_NAME, CARD_NAME):
        (built / name).replace(directory / name)
    return {
        "tracks": len(report.tracks),
        "held_out": len(report.held_out),
        "rejected": len(report.rejected),
        "findings": [
            {"severity": finding.severity, "track": finding.track, "reason": finding.reason}
            for finding in report.findings[:MAX_NAMED]
        ],
    }


def convert_adapter(job: ConversionJob, places: Places, directory: Path) -> dict:
    """Write the adapter in another format into `directory`.

    Raises:
        UsageError: it can't be read, or can't be written in that format.
    """
    from ..adapters.formats import write
    from ..adapters.formats.describe import base_model
    from ..commands.adapters import sentences

    name = job.name or Path(job.adapter).name.removesuffix(".safetensors")
    with sentences(job.adapter):
        adapter = _read(job.adapter, places, directory)
        if job.to == "diffusers":
            note = write.write_diffusers(adapter, directory)
        elif job.to == "peft":
            note = write.write_peft(adapter, directory, base_model=base_model(adapter) or "")
        else:
            note = write.write_comfyui(adapter, directory / write.comfyui_name(name))
    return {"family": adapter.family, "layers": len(adapter.modules), "note": note or None}


def describe_adapter(job: DescriptionJob, places: Places, directory: Path) -> dict:
    """Write `adapter.txt` and, where the kind allows it, `layers.png` into `directory`.

    Raises:
        UsageError: it can't be read.
    """
    from ..adapters.formats import describe
    from ..commands.adapters import sentences
    from ..files import sha256

    with sentences(job.adapter):
        adapter = _read(job.adapter, places, directory)
        norms = describe.layer_norms(adapter, None)
    text = describe.describe_adapter(adapter, norms, sha256=sha256(adapter.path))
    write_text(directory / "adapter.txt", text + "\n")
    if norms.layers:
        describe.draw_norms(norms, directory / "layers.png")
    return {"family": adapter.family, "layers": len(adapter.modules), "description": text}


def _read(address: str, places: Places, directory: Path):
    from ..adapters.formats.locate import load_adapter

    source = places.readable(address, "adapter", root=places.data, hub="hf://")
    check_size(source, directory)
    return load_adapter(source.removeprefix("hf://"))
