"""`acestep-lora adapters`: convert adapters between formats, look at one, add several up."""

import argparse
import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError, naming_failed_output
from ..paths import default_model
from .model_arguments import split_weight

if TYPE_CHECKING:
    from ..adapters.formats.base_weights import BaseWeights
    from ..adapters.formats.record import Adapter

FORMATS = {
    "diffusers": "pytorch_lora_weights.safetensors, also for this package",
    "peft": "adapter_model.safetensors and adapter_config.json: the official trainer and app, Side-Step",
    "comfyui": "<name>_comfyui.safetensors, for ComfyUI's models/loras",
    "merged": "a whole transformer in diffusers' layout, with the adapter in its weights",
}
SOURCE_HELP = "an adapter of any trainer: a folder, a file, a Hub id or s3://bucket/folder"


def add_arguments(commands: argparse._SubParsersAction, add_command) -> None:
    """Add the actions; `add_command(commands, name, description, run)` makes the parser of one."""
    command = add_command(commands, "convert", "write an adapter for another program", convert)
    command.add_argument("source", metavar="SRC", help=SOURCE_HELP)
    command.add_argument(
        "--to", required=True, choices=FORMATS, help="; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    )
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    command.add_argument("--name", help="the adapter's name in comfyui's file name (default: SRC's own)")
    _add_base_arguments(command, "the base of --to merged; else only to check that the adapter fits it")
    _add_strictness(command)

    command = add_command(commands, "info", "what an adapter is, and how strongly it changes each layer", info)
    command.add_argument("source", metavar="SRC", help=SOURCE_HELP)
    command.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the change of each layer")
    _add_base_arguments(command, "show the change as a share of this checkpoint's weights")

    command = add_command(commands, "merge", "add several adapters up to one, exactly", merge)
    command.add_argument(
        "sources", nargs="+", metavar="SRC:WEIGHT", help=f"{SOURCE_HELP}; with a weight, such as jazz:0.8 (default: 1)"
    )
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write all formats to")
    command.add_argument("--name", help="the adapter's name in comfyui's file name (default: DIR's)")
    _add_strictness(command)


def _add_base_arguments(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--pretrained_model_name_or_path", help=f"tiny, a folder, s3://… or a Hub id: {what}")
    command.add_argument("--variant_dir", help="which DiT of an original-layout checkpoint, e.g. acestep-v15-base")
    command.add_argument("--revision", help="branch, tag or commit of the checkpoint on the Hub")


def _add_strictness(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--strict", action=argparse.BooleanOptionalAction, default=True,
        help="refuse adapters that fit only in part or are all zeros; --no-strict warns (default: --strict)",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The actions


def convert(args: argparse.Namespace) -> int:
    """`adapters convert`."""
    from ..adapters.formats import write

    base = None
    if args.to != "merged":
        base = _base(args) if args.pretrained_model_name_or_path else None
    with sentences(args.source), naming_failed_output(args.output):
        adapter = _read(args.source, base, strict=args.strict)
        if args.to == "merged":
            return _merge_into_base(args, adapter)
        _refuse_source_folder(args.output, adapter)
        if args.to == "diffusers":
            note = write.write_diffusers(adapter, args.output)
        elif args.to == "peft":
            from ..adapters.formats.describe import base_model

            note = write.write_peft(adapter, args.output, base_model=base_model(adapter) or "")
        else:
            name = args.name or _own_name(adapter)
            note = write.write_comfyui(adapter, args.output / write.comfyui_name(name))
    print(f"Read {len(adapter.modules)} layers of {args.source} ({adapter.family}); wrote {args.output} ({args.to}).")
    if note:
        print(f"Note: {note}.")
    return 0


def _merge_into_base(args: argparse.Namespace, adapter: "Adapter") -> int:
    from ..adapters.formats.bake import write_merged
    from ..adapters.formats.describe import base_model

    if not args.pretrained_model_name_or_path:
        args.pretrained_model_name_or_path, said = default_model(base_model(adapter))
        print(
            f"Base: {args.pretrained_model_name_or_path} ({said if not base_model(adapter) else 'the adapter says'})"
        )
    base = _base(args)
    # Read again, against the shapes of the base.
    adapter = _read(args.source, base, strict=args.strict)
    write_merged(adapter, base, args.output)
    print(
        f"Wrote {args.output}: the transformer with {len(adapter.modules)} changed layers; load it with "
        f"AceStepTransformer1DModel.from_pretrained({str(args.output)!r})."
    )
    return 0


def info(args: argparse.Namespace) -> int:
    """`adapters info`."""
    from ..adapters.formats.describe import describe_adapter, draw_norms, layer_norms
    from ..files import sha256

    if args.picture is not None and args.picture.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--picture {args.picture}: the ending must be .png, .svg or .pdf.")
    base = _base(args) if args.pretrained_model_name_or_path else None
    with sentences(args.source):
        adapter = _read(args.source, base, strict=False)
        norms = layer_norms(adapter, base)
    print(describe_adapter(adapter, norms, sha256=sha256(adapter.path) if adapter.path else None))
    if args.picture is not None:
        if not norms.layers:
            raise UsageError("--picture has nothing to show without --pretrained_model_name_or_path for this kind.")
        with naming_failed_output(args.picture):
            draw_norms(norms, args.picture)
        print(f"Wrote {args.picture}")
    return 0


def merge(args: argparse.Namespace) -> int:
    """`adapters merge`."""
    from ..adapters.formats import write
    from ..adapters.formats.combine import combine
    from ..files import is_taken, sha256, write_text
    from ..paths import LORA_WEIGHTS_NAME

    pairs = [split_weight(source) for source in args.sources]
    if is_taken(args.output):
        raise UsageError(f"--output {args.output} exists and is not empty; name another.")
    adapters, sources = [], []
    for source, weight in pairs:
        with sentences(source):
            adapter = _read(source, None, strict=args.strict)
        adapters.append(adapter)
        sources.append({"source": source, "weight": weight, "sha256": sha256(adapter.path)})
    with sentences(", ".join(source for source, _ in pairs)):
        combined = combine(adapters, [weight for _, weight in pairs])
    with naming_failed_output(args.output):
        write.write_diffusers(combined, args.output)
        write.export(args.output, name=args.name or args.output.resolve().name)
        write_text(args.output / "merged_from.json", json.dumps({"adapters": sources}, indent=2) + "\n")
    ranks = sorted({weights.rank for weights in combined.modules.values()})
    terms = " + ".join(f"{weight:g} · {Path(source).name}" for source, weight in pairs)
    print(
        f"Wrote {args.output / LORA_WEIGHTS_NAME} = {terms}, exactly: of ranks up to {ranks[-1]} on "
        f"{len(combined.modules)} layers. The same is there for PEFT and ComfyUI."
    )
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# What they share


def _read(source: str, base: "BaseWeights | None", *, strict: bool) -> "Adapter":
    from ..adapters.formats.install import layer_shapes
    from ..adapters.formats.locate import load_adapter

    return load_adapter(source, layer_shapes=layer_shapes(base.model) if base else None, strict=strict)


def _base(args: argparse.Namespace) -> "BaseWeights":
    from ..adapters.formats.base_weights import BaseWeights
    from ..checkpoint_source import resolve_checkpoint

    checkpoint = resolve_checkpoint(
        args.pretrained_model_name_or_path, variant_dir=args.variant_dir, revision=args.revision
    )
    return BaseWeights(checkpoint)


@contextlib.contextmanager
def sentences(source: str) -> Iterator[None]:
    """What can't be used becomes one sentence that names the source, and what is doubtful a line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        except ValueError as error:
            what = " ".join(str(error).split()).rstrip(".").replace("strict=False loads", "--no-strict takes")
            raise UsageError(f"{source} can't be used: {what}.") from error
    for message in {str(warning.message): None for warning in caught if issubclass(warning.category, UserWarning)}:
        if message.startswith("the adapter"):
            print(f"warning: {message}")


def _own_name(adapter: "Adapter") -> str:
    path = adapter.path.resolve()
    generic = path.stem in ("pytorch_lora_weights", "adapter_model", "lokr_weights", "loha_weights")
    folder = path.parent.parent if path.parent.name in ("adapter", "peft") else path.parent
    return folder.name if generic else path.stem.removesuffix("_comfyui")


def _refuse_source_folder(output: Path, adapter: "Adapter") -> None:
    from ..training.run_directory import ARGS_NAME

    if adapter.path is not None and output.resolve() == adapter.path.parent.resolve():
        raise UsageError(f"--output {output} is the folder of the adapter itself; name another.")
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is not a folder; name one.")
    if (output / ARGS_NAME).exists():
        raise UsageError(f"--output {output} holds a run, whose adapter would be replaced; name another.")
