"""`acestep-lora generate`: music into files that say what they were made with."""

import argparse
import contextlib
import dataclasses
import json
import math
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from ..errors import Interrupted, RunError, UsageError
from ..paths import default_model, probe_writable
from ..prompt_fields import INSTRUMENTAL, PromptFields, known_bpm, known_keyscale, known_language
from ..version import __version__
from .model_arguments import add_model_arguments, load_pipeline, split_weight

# What plays music levels it to about this (Spotify, YouTube, Tidal: -14 LUFS).
DEFAULT_LUFS = -14.0
PEAK = 10 ** (-1 / 20)  # -1 dBFS, as the official app leaves it
# A comment in an AIFF can't be much longer.
MAX_COMMENT_CHARS = 8000


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    add_model_arguments(command)
    g = command.add_argument_group("what is played")
    g.add_argument("--prompt", required=True, help="tags or a description")
    g.add_argument("--lyrics", metavar="FILE", help="text file, also s3://… or hf://…; unset: [Instrumental]")
    g.add_argument("--vocal_language", "--language", default="unknown", help="of the lyrics, e.g. en (unknown)")
    g.add_argument("--duration", type=float, metavar="S", help="seconds, 1 to 600 (default: 30); with source audio "
                   "that's length")  # fmt: skip
    g.add_argument("--bpm", help="beats per minute")
    g.add_argument("--keyscale", "--key", help="key, such as 'C minor'")
    g.add_argument("--timesignature", choices=("2", "3", "4", "6"), help="beats in a bar")
    g = command.add_argument_group("adapters")
    g.add_argument("--adapter", action="append", default=[], metavar="NAME[:WEIGHT]",
                   help="any trainer's: folder, file, Hub id, s3://…; jazz:0.8 weighs it; repeatable")  # fmt: skip
    g.add_argument("--compare", action="store_true", help="write the same without the adapters too")
    g = command.add_argument_group("tasks with audio", "of any rate and channel count; lengths are in seconds")
    g.add_argument("--task", default="text2music", help="text2music, cover (--src_audio in another style), repaint (a "
                   "part of it anew), extract (one track of it), lego (one more track for it), complete (the tracks "
                   "that it lacks); the last three need the base variant (default: text2music)")  # fmt: skip
    g.add_argument("--src_audio", metavar="FILE", help="the source of every other task; also s3://… or hf://…")
    g.add_argument("--reference_audio", metavar="FILE", help="take the timbre of this; also s3://… or hf://…")
    g.add_argument("--repaint_start", type=float, metavar="S", help="repaint and lego: from here (default: 0)")
    g.add_argument("--repaint_end", type=float, metavar="S", help="to here (default: the end)")
    g.add_argument("--track_name", help="extract and lego: e.g. vocals, drums, bass, guitar")
    g.add_argument("--track_classes", help="complete: e.g. drums,bass")
    g.add_argument("--cover_strength", type=float, default=1.0, metavar="X", help="0 to 1: how closely a cover "
                   "follows its source (default: 1)")  # fmt: skip
    g = command.add_argument_group("sampling")
    g.add_argument("--seed", type=int, default=0, help="same seed: same noise (default: 0)")
    g.add_argument("--variations", type=int, default=1, metavar="N", help="of seed, seed + 1, … (default: 1)")
    g.add_argument("--batch_size", type=int, metavar="N", help="variations at a time; changes nothing but speed and "
                   "memory (default: 4 on a GPU, 1 on a CPU)")  # fmt: skip
    g.add_argument("--num_inference_steps", "--steps", type=int, metavar="N", help="denoising steps (50, turbo 8)")
    g.add_argument("--guidance_scale", "--guidance", type=float, metavar="X", help="classifier-free guidance (7, "
                   "turbo none)")  # fmt: skip
    g.add_argument("--shift", type=float, metavar="X", help="timestep shift (1, turbo 3)")
    g = command.add_argument_group("output", "each file comes with a .json that says what it was made with")
    g.add_argument("--output", type=Path, default=Path("out.wav"), metavar="FILE", help="wav, flac, ogg, opus or mp3; "
                   "variations get their seed behind the name (default: out.wav)")  # fmt: skip
    g.add_argument("--format", choices=("wav", "flac", "mp3", "ogg", "opus"), help="in place of --output's ending")
    g.add_argument("--loudness", default=f"{DEFAULT_LUFS:g}", metavar="LUFS", help="level to this, as far as peaks of "
                   "-1 dBFS allow; none: peaks at -1 dBFS (default: %(default)s)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Check everything, load the model, and write one file after the other.

    Raises:
        UsageError: a flag can't be used; before the model is loaded.
        RunError: the disk is full.
        Interrupted: Ctrl-C; says which files are finished.
    """
    from tqdm import tqdm

    from ..adapters.formats.locate import locate
    from ..generation import SamplingSettings, Task
    from ..storage.copies import local_file

    output = _output_path(args)
    sampling = SamplingSettings(args.num_inference_steps, args.guidance_scale, args.shift, args.seed)
    task = Task(
        task_type=args.task,
        src_audio=args.src_audio and local_file(args.src_audio),
        reference_audio=args.reference_audio and local_file(args.reference_audio),
        repainting_start=args.repaint_start,
        repainting_end=args.repaint_end,
        track_name=args.track_name,
        complete_track_classes=tuple(filter(None, map(str.strip, (args.track_classes or "").split(",")))),
        audio_cover_strength=args.cover_strength,
    )
    fields = _prompt_fields(args, source_s=task.source_duration_s())
    adapters = [(locate(source), source, weight) for source, weight in map(_split_weight, args.adapter)]
    _check_numbers(args, has_adapters=bool(adapters))
    target_lufs = _target_lufs(args.loudness)
    try:
        probe_writable(output.parent)
    except OSError as error:
        raise UsageError(f"--output {output} can't be written ({error.strerror}); choose another.") from error

    pipeline = load_pipeline(args)
    _warn_about_variant(pipeline, task)
    record = {
        "generator": f"ACE-Step LoRA {__version__}",
        "base": default_model(args.pretrained_model_name_or_path)[0],
        "variant_dir": args.variant_dir,
        "revision": args.revision,
        "adapters": _load_adapters(pipeline, adapters),
        "task": {name: getattr(args, name) if isinstance(value, Path) else value
                 for name, value in dataclasses.asdict(task).items() if value not in (None, ())},
        **dataclasses.asdict(fields),
        **dataclasses.asdict(sampling.resolved(is_turbo=pipeline.is_turbo)),
    }  # fmt: skip
    seeds = range(args.seed, args.seed + args.variations)
    batch_size = args.batch_size or (4 if pipeline.device.type == "cuda" else 1)
    output.parent.mkdir(parents=True, exist_ok=True)
    finished = 0
    try:
        for path, waveform, made_with in _clips(
            pipeline, fields, sampling, task, seeds, batch_size, record, output, compare=args.compare
        ):
            with _uninterrupted():
                said = write_clip(path, waveform, made_with, sample_rate=pipeline.sample_rate, target_lufs=target_lufs)
                tqdm.write(f"Wrote {path}{said}")  # above the progress bar
                finished += 1
    except OSError as error:
        path = error.filename or output
        raise RunError(f"{path} can't be written ({error.strerror}); make room, and run this again.") from error
    except KeyboardInterrupt as stop:
        number = args.variations * (2 if args.compare else 1)
        raise Interrupted(signal.SIGINT, f"Stopped: {finished} of {number} files are finished.") from stop
    return 0


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: a file has its record beside it, and is counted."""
    noted = []
    before = signal.signal(signal.SIGINT, lambda *given: noted.append(given))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if noted and callable(before):
        before(*noted[0])


def _output_path(args: argparse.Namespace) -> Path:
    from ..data.audio import AUDIO_SUFFIXES

    output = args.output
    if args.format:
        known = output.suffix.lower() in AUDIO_SUFFIXES
        output = output.with_suffix(f".{args.format}") if known else output.with_name(f"{output.name}.{args.format}")
    if output.suffix.lower() not in AUDIO_SUFFIXES:
        raise UsageError(f"--output {output}: the ending must be one of {', '.join(sorted(AUDIO_SUFFIXES))}.")
    if output.is_dir():
        raise UsageError(f"--output {output} is a folder; name a file in it.")
    return output


def _check_numbers(args: argparse.Namespace, *, has_adapters: bool) -> None:
    for name in ("variations", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, not {value}.")
    if not 0 <= args.seed <= 2**63 - args.variations:
        raise UsageError(f"--seed must be in [0, 2**63), not {args.seed}.")
    if args.compare and not has_adapters:
        raise UsageError("--compare needs --adapter: without one there is nothing to compare.")


def _prompt_fields(args: argparse.Namespace, *, source_s: float | None) -> PromptFields:
    """What the model is told; raises `UsageError` for what it would not understand."""
    if source_s is not None and args.duration is not None:
        raise UsageError("--duration is the source's with --src_audio; leave it out.")
    duration_s = source_s or (30.0 if args.duration is None else args.duration)
    if not 1 <= duration_s <= 600:
        raise UsageError(f"--duration must be between 1 and 600 seconds, not {duration_s:g}.")
    return PromptFields(
        prompt=args.prompt,
        lyrics=_read_lyrics(args.lyrics),
        vocal_language=known_language(args.vocal_language, name="--vocal_language"),
        bpm=None if args.bpm is None else known_bpm(args.bpm, name="--bpm"),
        keyscale=None if args.keyscale is None else known_keyscale(args.keyscale, name="--keyscale"),
        timesignature=args.timesignature,
        audio_duration=duration_s,
    )


def _read_lyrics(path: str | None) -> str:
    from ..data.text.text_files import read_text
    from ..storage.copies import local_file

    if path is None:
        return INSTRUMENTAL
    warnings: list[str] = []
    text = read_text(local_file(path), warnings)
    if text is None:
        raise UsageError(f"--lyrics {path}: {warnings[-1].removesuffix(' and is left out')}.")
    for warning in warnings:
        print(f"warning: {warning}", flush=True)
    return text.strip() or INSTRUMENTAL


def _target_lufs(text: str) -> float | None:
    if text.lower() == "none":
        return None
    try:
        target = float(text)
    except ValueError:
        target = math.nan
    if not -70 <= target <= 0:
        raise UsageError(f"--loudness must be between -70 and 0 LUFS, or none, not {text}.")
    return target


def _split_weight(adapter: str) -> tuple[str, float]:
    from ..adapters.weights import MAX_WEIGHT

    source, weight = split_weight(adapter)
    if abs(weight) > MAX_WEIGHT:
        raise UsageError(f"--adapter {adapter}: the weight must be between -{MAX_WEIGHT:g} and {MAX_WEIGHT:g}.")
    return source, weight


def _load_adapters(pipeline, adapters: list[tuple[Path, str, float]]) -> list[dict]:
    """Load and weigh adapters: their file here, how they were named, and their weight; returns what is on record."""
    from ..files import sha256

    names = [f"adapter_{number}" for number in range(len(adapters))]
    for name, (file, _, _) in zip(names, adapters, strict=True):
        pipeline.load_lora_weights(file, adapter_name=name)
    if names:
        pipeline.set_adapters(names, [weight for _, _, weight in adapters])
    return [{"adapter": source, "weight": weight, "sha256": sha256(file)} for file, source, weight in adapters]


def _warn_about_variant(pipeline, task) -> None:
    from ..generation import TURBO_TASKS

    if pipeline.is_turbo and task.task_type not in TURBO_TASKS:
        print(f"warning: a turbo model was not made for --task {task.task_type}; the base variant was.", flush=True)


def _clips(pipeline, fields, sampling, task, seeds, batch_size, record, output, *, compare):
    """Yields path, waveform and record of one clip after the other, without the adapters after with them."""
    from ..generation import generate_variations
    from ..progress import progress_bar

    pipeline.set_progress_bar_config(disable=True)
    with_adapters = (True, False) if compare else (True,)
    steps = sampling.resolved(is_turbo=pipeline.is_turbo).num_inference_steps
    batches = [list(seeds[start : start + batch_size]) for start in range(0, len(seeds), batch_size)]
    with progress_bar(total=len(batches) * len(with_adapters) * steps, desc="Generating", unit="step") as progress:
        for batch in batches:
            for adapted in with_adapters:
                if compare:
                    (pipeline.enable_lora if adapted else pipeline.disable_lora)()
                waveforms = generate_variations(
                    pipeline, fields, sampling, seeds=batch, task=task, on_step=progress.update
                )
                for seed, waveform in zip(batch, waveforms, strict=True):
                    stem = output.stem + (f"_seed{seed}" if len(seeds) > 1 else "")
                    path = output.with_name(stem + ("" if adapted else "_without_adapter") + output.suffix)
                    yield path, waveform, record | {"seed": seed} | ({} if adapted else {"adapters": []})


def write_clip(path: Path, waveform, record: dict, *, sample_rate: int, target_lufs: float | None) -> str:
    """Level a clip and write it, its tags, and the record beside it; returns what is to be said of its loudness."""
    from ..data.audio import write_audio
    from ..data.loudness import normalise_loudness
    from ..files import write_text

    said = ""
    if target_lufs is not None:
        waveform, reached = normalise_loudness(waveform, sample_rate=sample_rate, target_lufs=target_lufs, peak=PEAK)
        record = record | {"loudness_lufs": None if reached is None else round(reached, 2)}
        if reached is None:
            said = "  (silence)"
        elif reached < target_lufs - 0.05:
            said = f"  ({reached:.1f} LUFS: more would clip)"
    record = record | {"created": datetime.now(UTC).isoformat(timespec="seconds")}
    comment = json.dumps(record)
    if len(comment) > MAX_COMMENT_CHARS:
        comment = json.dumps(record | {"lyrics": f"see {path.stem}.json"})
    tags = {"title": " ".join(record["prompt"].split())[:200], "software": record["generator"], "comment": comment}
    write_audio(path, waveform, sample_rate=sample_rate, tags=tags)
    write_text(path.with_suffix(".json"), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return said
