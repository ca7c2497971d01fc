"""A checkpoint in the original layout, written once more in diffusers' layout, one component at a time."""

from pathlib import Path

import torch
from diffusers import AceStepPipeline, AutoencoderOobleck, FlowMatchEulerDiscreteScheduler
from transformers import AutoConfig, AutoModel, AutoTokenizer

from .checkpoint_conversion import (
    DIT_CLASSES,
    OriginalCheckpoint,
    build_scheduler,
    load_dit_components,
    load_text_encoder,
    load_vae,
)
from .errors import RunError, UsageError
from .files import is_taken, replacing_directory
from .paths import probe_writable
from .progress import progress_bar, quiet_loading

# What is copied in memory at a time; weights that are only renamed stay in the mapped file until then.
MAX_SHARD_SIZE = "1GB"


def write_diffusers_checkpoint(source: OriginalCheckpoint, directory: Path) -> Path:
    """Convert a checkpoint, in the precision of its files; plain diffusers loads the result.

    The memory that it takes is about that of the DiT's file: weights are mapped, renamed and written in shards.

    Raises:
        UsageError: `directory` exists and is not empty, can't be written, or the source is damaged.
        RunError: the disk is full.
    """
    directory = Path(directory)
    if is_taken(directory):
        raise UsageError(f"{directory} exists already and is not an empty folder; name another, or remove it.")
    try:
        probe_writable(directory.parent)
    except OSError as error:
        raise UsageError(f"{directory} can't be written ({error.strerror}); name a folder that can.") from error
    try:
        with quiet_loading(), replacing_directory(directory) as replacement, replacement() as new:
            _write_components(source, new)
            _write_index(new)
    except OSError as error:
        raise RunError(f"{directory} can't be written: {error.strerror or error}; nothing of it was kept.") from error
    return directory


def _write_components(source: OriginalCheckpoint, directory: Path) -> None:
    components = load_dit_components(source.dit, torch_dtype=None)
    with progress_bar(total=7, desc="Converting", unit="component") as progress:
        for name in list(components):
            components.pop(name).save_pretrained(directory / name, max_shard_size=MAX_SHARD_SIZE)
            progress.update()
        load_vae(source.vae, torch_dtype=None).save_pretrained(directory / "vae")
        progress.update()
        text_encoder, tokenizer = load_text_encoder(source.text_encoder, torch_dtype=None)
        text_encoder.save_pretrained(directory / "text_encoder", max_shard_size=MAX_SHARD_SIZE)
        tokenizer.save_pretrained(directory / "tokenizer")
        progress.update()
        build_scheduler().save_pretrained(directory / "scheduler")
        progress.update()


def _write_index(directory: Path) -> None:
    """`model_index.json`, written by diffusers from components without weights."""
    with torch.device("meta"):
        components = {
            name: cls.from_config(cls.load_config(directory / name)) if (directory / name).is_dir() else None
            for name, cls in {**DIT_CLASSES, "vae": AutoencoderOobleck}.items()
        }
        components["text_encoder"] = AutoModel.from_config(AutoConfig.from_pretrained(directory / "text_encoder"))
    components["tokenizer"] = AutoTokenizer.from_pretrained(directory / "tokenizer")
    components["scheduler"] = FlowMatchEulerDiscreteScheduler.from_pretrained(directory / "scheduler")
    AceStepPipeline(**components).save_config(directory)
