"""The `acestep-lora` command. Each subcommand imports what it needs when it runs, so that `--help` is quick."""

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

from . import doctor
from .command_line import accept_either_dash, flags_of, refuse_unknown
from .commands import adapters as adapters_command
from .commands import generate as generate_command
from .commands import storage as storage_command
from .commands.model_arguments import add_model_arguments, open_encoders
from .errors import UsageError, naming_failed_output, one_sentence_errors
from .paths import cache_dir, check_addresses, default_data
from .presets import preset_names
from .version import __version__

_DATA_HELP = "folder of audio, or a dataset, also s3://… or hf://…; unset: $ACESTEP_DATA, else /data, else ./data"


def build_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands; each sets `run`, a function from arguments to an exit status."""
    parser = argparse.ArgumentParser(
        prog="acestep-lora", description="Prepare, use and check ACE-Step 1.5 LoRAs.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"acestep-lora {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = _command(commands, "generate", "make music, with an adapter or without", generate_command.run)
    generate_command.add_arguments(command)

    command = _command(commands, "cache", "encode a folder of music now, for a training later", _cache)
    add_model_arguments(command)
    command.add_argument("--train_data_dir", help=_DATA_HELP)
    command.add_argument("--streaming", action="store_true", help="as in training: fetch the audio of s3://… or "
                         "hf://… when it is to be encoded, and keep its latents alone")  # fmt: skip
    command.add_argument("--max_duration_s", type=float, default=240.0, help="as in training (default: 240)")
    command.add_argument("--min_duration_s", type=float, default=10.0, help="as in training (default: 10)")
    command.add_argument("--latent_cache_dir", type=Path, help="unset: latents in the project's cache folder")
    command.add_argument("--trigger_word", metavar="WORD", help="as in training")
    command.add_argument("--trigger_position", default="prepend", help="as in training (default: prepend)")
    command.add_argument("--tag_shuffle", type=int, default=1, help="as in training (default: 1)")
    command.add_argument("--caption_dropout", type=float, default=0.0, help="as in training: above 0 encodes texts "
                         "without tags (default: 0)")  # fmt: skip
    command.add_argument("--seed", type=int, default=42, help="as in training, for --tag_shuffle (default: 42)")

    command = _command(
        commands, "estimate", "predict memory and time of a training, before anything is downloaded", _estimate
    )
    command.epilog = "Every flag of train_ace_step_lora.py works here too, e.g. --rank 32 --max_duration_s 60."
    command.add_argument("--preset", choices=preset_names(), help="as in training")
    command.add_argument("--data", "--train_data_dir", help=_DATA_HELP)
    command.add_argument("--gpu", help="e.g. 'RTX 3060', h100; this: measure this machine; unset: all known ones")
    command.add_argument("--num_processes", type=int, default=1, help="how many of that GPU (default: 1)")
    command.add_argument("--config", choices=("2b", "xl"), help="the model's size; unset: the checkpoint's")
    command.add_argument(
        "--pretrained_model_name_or_path", help="a folder's own shape is read; of a Hub id only the name counts"
    )
    command.add_argument("--variant_dir", help="which DiT of an original-layout checkpoint, e.g. acestep-v15-base")

    command = _command(commands, "tiny-checkpoint", "write the embedded toy checkpoint to a folder", _tiny_checkpoint)
    command.add_argument("directory", type=Path, help="a new folder")

    command = _command(
        commands, "convert-checkpoint", "write a checkpoint of the original layout in diffusers' layout", _convert
    )
    command.add_argument("source", help="the original layout: a folder, s3://…, hf://… or a Hub id")
    command.add_argument("directory", type=Path, help="a new folder")
    command.add_argument("--variant_dir", help="which DiT of several, e.g. acestep-v15-base")
    command.add_argument("--revision", help="branch, tag or commit on the Hub")

    command = _command(commands, "dataset", "build a dataset from folders of music", None)
    actions = command.add_subparsers(title="actions", required=True, metavar="ACTION")
    _add_build_arguments(_command(actions, "build", "read, check and pack folders of audio", _dataset_build))

    command = _command(commands, "adapters", "convert adapters, look at one, add several up", None)
    actions = command.add_subparsers(title="actions", required=True, metavar="ACTION")
    adapters_command.add_arguments(actions, _command)

    command = _command(commands, "storage", "publish, fetch and check folders on S3, a shared disk or the Hub", None)
    actions = command.add_subparsers(title="actions", required=True, metavar="ACTION")
    storage_command.add_arguments(actions, _command)

    command = _command(commands, "doctor", "check this machine and say how to fix what is wrong", doctor.run)
    doctor.add_arguments(command)
    accept_either_dash(parser)
    return parser


def _add_build_arguments(command: argparse.ArgumentParser) -> None:
    g = command.add_argument_group("input and output")
    g.add_argument(
        "--data-dir", nargs="+", required=True, metavar="DIR", help="folders of audio, also s3://… or hf://…"
    )
    g.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="where the dataset goes")
    g.add_argument("--link", action="store_true", help="refer to the audio files where they are instead of copying")
    g.add_argument("--min-duration-s", type=float, default=2.0, metavar="S", help="reject shorter tracks (default: 2)")
    g = command.add_argument_group("what is checked")
    g.add_argument(
        "--validate-audio", action="store_true", help="decode every file completely and look for what is wrong"
    )
    g.add_argument("--drop-near-duplicates", action="store_true", help="reject what sounds the same as another track")
    g = command.add_argument_group(
        "what is filled in", "only where you left a field empty, and marked as machine-made"
    )
    g.add_argument(
        "--genre-from-folder", action="store_true", help="a genre that no sidecar gives is the folder's name"
    )
    g.add_argument(
        "--auto-tag", action="store_true", help="estimate missing BPM and key; unsure ones stay empty [auto-tag]"
    )
    g.add_argument("--captioner", metavar="MODULE:FUNCTION", help="describe tracks without tags with your function")
    g = command.add_argument_group("what is trained on")
    g.add_argument("--balance", type=float, nargs="?", const=1.0, default=0.0, metavar="X",
                   help="hear small genres more often: 1 (bare flag) evens all genres out")  # fmt: skip
    g.add_argument(
        "--holdout", type=float, default=0.0, metavar="X", help="hold this share of every genre out, e.g. 0.1"
    )
    g = command.add_argument_group("how it runs")
    g.add_argument("--engine", choices=("local", "ray"), default="local", help="ray: on a cluster, same output [ray]")
    g.add_argument(
        "--num-workers", type=int, metavar="N", help="tracks decoded at a time (default: the number of cores)"
    )


def _command(commands, name: str, description: str, run) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=description, description=description, allow_abbrev=False)
    command.set_defaults(run=run, parser=command)
    return command


def _cache(args: argparse.Namespace) -> int:
    from .data.latent_cache import LatentCache, prepare_tracks
    from .data.track_sources import locate
    from .data.tracks import describe_problems, doubts_about_text, load_tracks
    from .training.argument_checks import check_bounds
    from .training.settings import check_streaming, text_options

    check_bounds(args, only=vars(args))
    text = text_options(args)
    data, said = default_data(args.train_data_dir)
    check_streaming(args.streaming, data)
    print(f"Data: {data} ({said})", flush=True)
    tracks, problems = load_tracks(locate(data, streaming=args.streaming), min_duration_s=args.min_duration_s)
    directory = args.latent_cache_dir or cache_dir() / "latents"
    encoders = open_encoders(args, directory)
    cache = LatentCache(directory, encoders, text)
    cached, found = prepare_tracks(cache, tracks, max_duration_s=args.max_duration_s)
    problems += doubts_about_text(tracks, text) + found
    if problems:
        print("\n".join(describe_problems(problems)))
    minutes = sum(entry.num_frames for entry in cached) / encoders.facts.latents_per_second / 60
    print(f"{len(cached)} tracks, {minutes:.1f} min, are cached in {cache.latents_dir.parent}")
    if not cached:
        return 2
    print(f"Next: accelerate launch train_ace_step_lora.py --preset c{_given_flags(args)}")
    return 0


def _given_flags(args: argparse.Namespace) -> str:
    """The flags of `cache` that were given, for the training, which has them all."""
    flags = ""
    for name in (flag[2:] for flag in flags_of(args.parser)):
        value = getattr(args, name, None)
        if value not in (None, args.parser.get_default(name)):
            flags += f" --{name}" if value is True else f" --{name} {shlex.quote(str(value))}"
    return flags


def _estimate(args: argparse.Namespace) -> int:
    from .estimation import report

    return report.run(args)


def _dataset_build(args: argparse.Namespace) -> int:
    from .data.building.build_report import BuildOptions, describe_build
    from .data.building.ingest import build_dataset

    if args.num_workers is not None and args.num_workers < 1:
        raise UsageError(f"--num-workers must be at least 1, not {args.num_workers}.")
    options = BuildOptions(**{field.name: getattr(args, field.name) for field in dataclasses.fields(BuildOptions)})
    with naming_failed_output(args.output_dir):
        report = build_dataset(
            args.data_dir, args.output_dir, options, engine=args.engine, num_workers=args.num_workers
        )
    print(describe_build(report))
    output_dir = shlex.quote(str(args.output_dir))
    print(f"Next: accelerate launch train_ace_step_lora.py --preset c --train_data_dir {output_dir}")
    return 0


def _tiny_checkpoint(args: argparse.Namespace) -> int:
    from .tiny_checkpoint import size_bytes, write_tiny_checkpoint

    directory = write_tiny_checkpoint(args.directory)
    print(
        f"Wrote {directory} ({size_bytes(directory) / 1e6:.1f} MB, random weights: for trying things, not for music)"
    )
    print(f"Next: accelerate launch train_ace_step_lora.py --preset smoke --pretrained_model_name_or_path {directory}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from .checkpoint_conversion import OriginalCheckpoint
    from .checkpoint_source import resolve_checkpoint
    from .checkpoint_writing import write_diffusers_checkpoint
    from .tiny_checkpoint import size_bytes

    source = resolve_checkpoint(args.source, variant_dir=args.variant_dir, revision=args.revision)
    if not isinstance(source, OriginalCheckpoint):
        raise UsageError(f"{args.source} is in diffusers' layout already ({source}): there is nothing to convert.")
    with naming_failed_output(args.directory):
        directory = write_diffusers_checkpoint(source, args.directory)
    print(f"Wrote {directory} ({size_bytes(directory) / 1e9:.2f} GB)")
    print(f"Next: acestep-lora generate --pretrained_model_name_or_path {shlex.quote(str(directory))} --prompt …")
    return 0


def main(argv: list[str] | None = None) -> None:
    """Entry point: exit status 0 done, 1 the work failed, 2 wrong usage or input."""
    parser = build_parser()
    args, training_flags = parser.parse_known_args(argv)
    if training_flags and args.run is not _estimate:
        refuse_unknown(parser, training_flags, flags_of(args.parser))
    args.training_flags = training_flags
    with one_sentence_errors(debug=args.debug):
        check_addresses(*vars(args).values())
        status = args.run(args)
        sys.stdout.flush()  # `| head` may be gone
    sys.exit(status)


if __name__ == "__main__":
    main()
