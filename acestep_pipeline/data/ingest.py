"""From folders of music to a `datasets` directory that can be inspected, trusted and trained on."""

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..errors import UsageError
from ..files import write_text
from ..paths import cache_dir, probe_writable
from ..progress import progress_bar
from ..version import __version__
from .analysis import ANALYSIS_VERSION, Finding, Measurements, judge, measure
from .audio import AudioError, read_audio
from .tracks import Track, dataset_fingerprint, load_tracks

REPORT_NAME = "report.json"
RECOMMENDED_TAGS = (5, 10)
COLUMNS = ("id", "tags", "lyrics", "language", "genre", "bpm", "keyscale", "timesignature", "duration_s",
           "sample_rate", "channels", "sha256")  # fmt: skip


@dataclass(frozen=True)
class BuildReport:
    """What a build did: the tracks taken, every finding, and the fingerprint that equal input gives again."""

    output_dir: Path
    tracks: list[Track]
    findings: list[Finding]
    fingerprint: str
    reused: bool

    @property
    def rejected(self) -> list[Finding]:
        """The findings for which a track is left out."""
        return [finding for finding in self.findings if finding.severity == "error"]


def build_dataset(
    data_dirs: list[Path],
    output_dir: Path,
    *,
    validate_audio: bool = False,
    genre_from_folder: bool = False,
    min_duration_s: float = 0.0,
    num_workers: int | None = None,
    show_progress: bool = True,
) -> BuildReport:
    """Read folders of audio with sidecars into one `datasets` directory with a report beside the data.

    The directory appears under its name only when complete. A second build of the same input finds it unchanged and
    does nothing; measurements are kept by file hash, so only new and changed files are decoded again.

    Args:
        data_dirs: folders, as `load_tracks` takes them; with several, ids begin with the folder's name.
        output_dir: a new directory, or one that an earlier build wrote, which is replaced.
        validate_audio: decode every file completely, measure it, and reject what is damaged, silent or a copy.
        genre_from_folder: a track without a genre takes its parent folder's name.
        min_duration_s: shorter tracks are rejected.
        num_workers: threads that decode; the number of cores if None.
        show_progress: draw progress bars.

    Raises:
        UsageError: a folder is missing, no track is usable, or `output_dir` holds something else.
    """
    previous = _check_output(output_dir)
    tracks, findings = _read_folders(data_dirs, genre_from_folder, min_duration_s, show_progress)
    findings += [Finding(track.id, "warning", reason) for track in tracks for reason in _judge_tags(track)]
    tracks, copies = _reject_copies(tracks)
    findings += copies
    measurements: dict[str, Measurements] = {}
    if validate_audio:
        tracks, measurements, found = _validate(tracks, num_workers or os.cpu_count() or 1, show_progress)
        findings += found
    if not tracks:
        reasons = "; ".join(
            f"{finding.track}: {finding.reason}" for finding in findings if finding.severity == "error"
        )
        raise UsageError(f"no track in {', '.join(map(str, data_dirs))} is usable: {reasons[:2000]}")
    fingerprint = dataset_fingerprint(tracks)
    findings.sort(key=lambda finding: (("error", "warning", "note").index(finding.severity), finding.track))
    report = BuildReport(output_dir, tracks, findings, fingerprint, reused=False)
    content = _report_content(report, measurements, validated=validate_audio)
    if content == previous:
        return replace(report, reused=True)
    _write(report, content)
    return report


def _check_output(output_dir: Path) -> dict | None:
    """The report of the build that is there, None where nothing is; anything else is not ours to replace."""
    try:
        probe_writable(output_dir.parent)
    except OSError as error:
        raise UsageError(f"--output-dir {output_dir} can't be written ({error.strerror}); choose another.") from error
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return None
    try:
        report = json.loads((output_dir / REPORT_NAME).read_text(encoding="utf-8"))
        if (output_dir / "state.json").is_file() and report["fingerprint"]:
            return report
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a report of somebody else's, or none
    raise UsageError(f"--output-dir {output_dir} holds something that is not a dataset of ours; name another.")


def _read_folders(
    data_dirs: list[Path], genre_from_folder: bool, min_duration_s: float, show_progress: bool
) -> tuple[list[Track], list[Finding]]:
    tracks, findings, failures = [], [], []
    for folder in data_dirs:
        prefix = f"{folder.name}/" if len(data_dirs) > 1 else ""
        try:
            found, problems = load_tracks(folder, min_duration_s=min_duration_s, show_progress=show_progress)
        except UsageError as error:
            failures.append(str(error))
            continue
        for track in found:
            genre = track.genre or (Path(prefix + track.id).parent.name if genre_from_folder else "")
            tracks.append(replace(track, id=prefix + track.id, genre=genre, tags=track.tags or genre))
        findings += [
            Finding(prefix + problem.track, "error" if problem.skipped else "warning", problem.reason)
            for problem in problems
        ]
    if failures:
        raise UsageError("; ".join(failures))
    return tracks, findings


def _judge_tags(track: Track) -> Iterator[str]:
    count = len([tag for tag in track.tags.split(",") if tag.strip()])
    if 0 < count < RECOMMENDED_TAGS[0]:
        yield f"it has {count} tags; {RECOMMENDED_TAGS[0]} to {RECOMMENDED_TAGS[1]} describe a track well"


def _reject_copies(tracks: list[Track]) -> tuple[list[Track], list[Finding]]:
    """Keep the first of several files with the same bytes."""
    first: dict[str, Track] = {}
    copies = []
    for track in tracks:
        if track.sha256 in first:
            copies.append(Finding(track.id, "error", f"it is an exact copy of {first[track.sha256].id}"))
        else:
            first[track.sha256] = track
    return list(first.values()), copies


def _validate(
    tracks: list[Track], num_workers: int, show_progress: bool
) -> tuple[list[Track], dict[str, Measurements], list[Finding]]:
    """Decode and measure in threads (libsndfile, soxr and numpy work outside the interpreter's lock), in order."""
    kept, measurements, findings = [], {}, []
    layout = "{l_bar}{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}]"
    total = sum(track.duration_s for track in tracks)
    with (
        ThreadPoolExecutor(num_workers) as pool,
        progress_bar(total=total, desc="Validating audio", bar_format=layout, disable=not show_progress) as bar,
    ):
        for track, result in zip(tracks, pool.map(_measure_cached, tracks), strict=True):
            bar.update(track.duration_s)
            if isinstance(result, AudioError):
                findings.append(Finding(track.id, "error", str(result)))
                continue
            found = judge(track.id, result, sample_rate=track.sample_rate, channels=track.channels)
            findings += found
            if not any(finding.severity == "error" for finding in found):
                kept.append(track)
                measurements[track.id] = result
    return kept, measurements, findings


def _measure_cached(track: Track) -> Measurements | AudioError:
    """Measure a track once per content: the result is kept by the file's hash."""
    path = cache_dir() / f"analysis-v{ANALYSIS_VERSION}" / f"{track.sha256}.json"
    try:
        return Measurements(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        pass  # not measured yet, or by a program that was cut off
    try:
        measured = measure(read_audio(track.source))
    except AudioError as error:
        return error
    write_text(path, json.dumps(measured.as_dict()))
    return measured


def _report_content(report: BuildReport, measurements: dict[str, Measurements], *, validated: bool) -> dict:
    rows = [
        {name: getattr(track, name) for name in COLUMNS if name != "lyrics"}
        | {"measured": measurements[track.id].as_dict() if track.id in measurements else None}
        for track in report.tracks
    ]
    return {
        "version": __version__,
        "fingerprint": report.fingerprint,
        "validated": validated,
        "genres": _count_genres(report.tracks),
        "findings": [asdict(finding) for finding in report.findings],
        "tracks": rows,
    }


def _count_genres(tracks: list[Track]) -> dict[str, dict]:
    """Tracks and minutes of each genre, the longest first."""
    counts, minutes = Counter(), Counter()
    for track in tracks:
        genre = track.genre or "(no genre)"
        counts[genre] += 1
        minutes[genre] += track.duration_s / 60
    return {genre: {"tracks": counts[genre], "minutes": round(total, 2)} for genre, total in minutes.most_common()}


def _write(report: BuildReport, content: dict) -> None:
    """Write data and report under a temporary name, then put them in place of what was there."""
    from datasets import Audio, Dataset, Features, Value

    kinds = {"bpm": "int32", "duration_s": "float64", "sample_rate": "int32", "channels": "int32"}
    # Encoding an Audio feature needs TorchCodec; bytes and path don't, and cast to one without decoding.
    features = Features(
        {"audio": {"bytes": Value("binary"), "path": Value("string")}}
        | {name: Value(kinds.get(name, "string")) for name in COLUMNS}
    )

    def rows() -> Iterator[dict]:
        for track in report.tracks:
            source = track.source
            content = source if isinstance(source, bytes) else source.read_bytes()
            audio = {"bytes": content, "path": Path(track.id).name}
            yield {"audio": audio} | {name: getattr(track, name) for name in COLUMNS}

    output_dir = report.output_dir
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".partial-{output_dir.name}-", dir=output_dir.parent))
    try:
        dataset = Dataset.from_generator(rows, features=features, cache_dir=str(temporary / "cache"))
        dataset.cast_column("audio", Audio(decode=False)).save_to_disk(str(temporary / "dataset"))
        (temporary / "dataset" / REPORT_NAME).write_text(json.dumps(content, indent=1, ensure_ascii=False), "utf-8")
        if output_dir.exists():
            os.replace(output_dir, temporary / "old")
        try:
            os.replace(temporary / "dataset", output_dir)
        except OSError:  # what was there goes back before the temporary folder is removed with it
            if (temporary / "old").exists():
                os.replace(temporary / "old", output_dir)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def describe_build(report: BuildReport) -> str:
    """Every finding, minutes by genre, and what was written, for a person."""
    words = {"error": "rejected"}
    lines = [f"  {words.get(f.severity, f.severity):<9}{f.track}: {f.reason}" for f in report.findings]
    for genre, total in _count_genres(report.tracks).items():
        lines.append(f"  {genre:<24}{total['tracks']:>5} tracks {total['minutes']:>8.1f} min")
    state = "is up to date" if report.reused else "was written"
    rejected = len({finding.track for finding in report.rejected})
    lines.append(f"{report.output_dir} {state}: {len(report.tracks)} tracks, {rejected} rejected; see {REPORT_NAME}.")
    return "\n".join(lines)
