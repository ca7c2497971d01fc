"""What is learnt from a track's sound, once per content: measurements and fingerprint, estimates, captions.

Results are kept in the cache folder by the file's hash, each as soon as it is there, so that a build that was killed,
or one over a changed folder, only listens to what it has not heard yet.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...engines import map_in_order
from ...files import write_text
from ...paths import cache_dir
from ...progress import progress_bar
from ...prompt_fields import INSTRUMENTAL
from ..audio import SAMPLE_RATE, AudioError, read_audio, stream_audio
from ..tracks import Track, describe_missing_tags
from .analysis import ANALYSIS_VERSION, Finding, Measurements, analyse, analysis_rate
from .auto_tags import ESTIMATES_VERSION, AutoTags, Estimate, MiddleSection, estimate_tags, with_machine_made
from .captioners import apply_captioner, load_captioner
from .fingerprint import decode, encode

Refusal = str


@dataclass(frozen=True)
class Examination:
    """`measurements` of a whole track, and its acoustic `fingerprint` (uint32 words)."""

    measurements: Measurements
    fingerprint: np.ndarray


def examine_tracks(
    tracks: list[Track], *, engine: str, num_workers: int, show_progress: bool
) -> Iterator[Examination | AudioError]:
    """Decode every track completely and measure it, in order; an `AudioError` says why one can't be used."""
    folder = f"analysis-v{ANALYSIS_VERSION}"
    results = _remembered(_examine, tracks, folder, "Validating audio", engine, num_workers, show_progress)
    for result in results:
        if isinstance(result, Refusal):
            yield AudioError(result)
        else:
            yield Examination(Measurements(**result["measurements"]), decode(result["fingerprint"]))


def estimate_tracks(
    tracks: list[Track], *, engine: str, num_workers: int, show_progress: bool
) -> Iterator[AutoTags | None]:
    """Estimate the tempo and key of every track, in order; None for one that can't be decoded."""
    folder = f"auto-tags-v{ESTIMATES_VERSION}"
    results = _remembered(_estimate, tracks, folder, "Estimating tempo and key", engine, num_workers, show_progress)
    for result in results:
        if isinstance(result, Refusal):
            yield None
        else:
            yield AutoTags(Estimate(*result["bpm"]), Estimate(*result["keyscale"]), result["by"])


def caption_tracks(tracks: list[Track], captioner: str, *, show_progress: bool) -> tuple[list[Track], list[Finding]]:
    """Let `module:function` describe the tracks that have no tags, one at a time, in this process.

    An answer is kept until the file that the function is written in changes.

    Returns:
        The tracks with what it said, marked as machine-made, and a warning for each track that it failed on.

    Raises:
        RunError: it broke its contract (see `captioners`).
    """
    function = load_captioner(captioner)
    version = hashlib.sha256(captioner.encode() + _source_code(function)).hexdigest()[:16]
    described, findings = {}, []
    lacking = [track for track in tracks if describe_missing_tags(track)]
    for track in progress_bar(iterable=lacking, desc="Captioning", unit="track", disable=not show_progress):
        path = _result_path(f"captions-{version}", track)
        fields = _read(path)
        if fields is None:
            known = {name: getattr(track, name) for name in ("genre", "language", "lyrics", "bpm", "keyscale")}
            try:
                waveform = read_audio(track.source)
            except AudioError as error:
                findings.append(Finding(track.id, "warning", f"the captioner did not hear it: {error}"))
                continue
            fields, problem = apply_captioner(function, waveform, SAMPLE_RATE, known)
            if problem is not None:
                findings.append(Finding(track.id, "warning", problem))
                continue
            write_text(path, json.dumps(fields))
        # What a person said stands.
        fields = {name: value for name, value in fields.items() if name == "tags" or not _is_known(track, name)}
        described[track.id] = with_machine_made(track, fields)
    return [described.get(track.id, track) for track in tracks], findings


def _is_known(track: Track, field: str) -> bool:
    return getattr(track, field) not in (None, "", "unknown", INSTRUMENTAL)


def _source_code(function: Callable) -> bytes:
    """The file that a function is written in; without one, nothing tells versions apart."""
    file = inspect.getsourcefile(inspect.unwrap(function))
    return Path(file).read_bytes() if file else b""


def _remembered(
    function: Callable[[Track], dict | Refusal],
    tracks: list[Track],
    folder: str,
    description: str,
    engine: str,
    num_workers: int,
    show_progress: bool,
) -> Iterator[dict | Refusal]:
    """`function` of each track in order, from the cache where it was done before; refusals are not kept."""
    missing = [track for track in tracks if _read(_result_path(folder, track)) is None]
    done = map_in_order(function, missing, engine=engine, num_workers=num_workers)
    awaited = {track.id for track in missing}
    layout = "{l_bar}{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}]"
    total = sum(track.duration_s for track in missing)
    with progress_bar(total=total, desc=description, bar_format=layout, disable=not show_progress) as bar:
        for track in tracks:
            path = _result_path(folder, track)
            if track.id not in awaited:
                result = _read(path)
            else:
                result = next(done)
                bar.update(track.duration_s)
                if not isinstance(result, Refusal):
                    write_text(path, json.dumps(result))
            yield result


def _result_path(folder: str, track: Track) -> Path:
    return cache_dir() / folder / track.sha256[:2] / f"{track.sha256}.json"


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # not there yet, or damaged: it is made (again)


def _examine(track: Track) -> dict | Refusal:
    try:
        rate = analysis_rate(track.sample_rate)
        measurements, words = analyse(stream_audio(track.source, sample_rate=rate), sample_rate=rate)
    except AudioError as error:
        return str(error)
    return {"measurements": measurements.as_dict(), "fingerprint": encode(words)}


def _estimate(track: Track) -> dict | Refusal:
    section = MiddleSection(duration_s=track.duration_s, sample_rate=SAMPLE_RATE)
    try:
        for block in stream_audio(track.source):
            section.add(block)
    except AudioError as error:
        return str(error)
    tags = estimate_tags(section.mono())
    pair = {name: [getattr(tags, name).value, getattr(tags, name).confidence] for name in ("bpm", "keyscale")}
    return pair | {"by": tags.by}
