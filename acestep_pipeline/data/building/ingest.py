"""From folders of music to a `datasets` directory that can be inspected, trusted and trained on."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from ...errors import UsageError
from ...files import replacing_directory
from ...paths import probe_writable
from ...progress import progress_bar
from ...storage.copies import local_copy
from ..audio import AudioError
from ..tracks import Track, load_tracks
from .analysis import Finding, Measurements, judge
from .auto_tags import fill_missing
from .build_report import CARD_NAME, PAGE_NAME, REPORT_NAME, BuildOptions, BuildReport, describe
from .dataset_files import TrackChanged, write_splits
from .examination import caption_tracks, estimate_tracks, examine_tracks
from .fingerprint import find_near_duplicates
from .report_card import render_card
from .report_page import render_report
from .splits import choose_holdout, sampling_weights


def build_dataset(
    data_dirs: Sequence[str | Path],
    output_dir: Path,
    options: BuildOptions = BuildOptions(),  # noqa: B008 (frozen)
    *,
    engine: str = "local",
    num_workers: int | None = None,
    show_progress: bool = True,
) -> BuildReport:
    """Read folders of audio with sidecars into one `datasets` directory with reports beside the data.

    The directory appears under its name only when complete. What was measured, estimated and captioned is kept by
    file hash, so that a build that was killed, or one over a changed folder, only does what is missing. A build of
    the same input finds the directory unchanged and does nothing.

    Args:
        data_dirs: folders as `load_tracks` takes them, or `s3://…`; with several, ids begin with the folder's name.
        output_dir: a new directory, or one that an earlier build wrote, which is replaced.
        options: what to do.
        engine: "local" or "ray" (see `engines`); the output is the same.
        num_workers: tracks decoded at a time; the number of cores if None.
        show_progress: draw progress bars.

    Raises:
        UsageError: an option is wrong, a folder is missing, no track is usable, or `output_dir` holds something else.
    """
    options.check()
    try:
        probe_writable(output_dir.parent)
    except OSError as error:
        raise UsageError(f"--output-dir {output_dir} can't be written ({error.strerror}); choose another.") from error
    run = {"engine": engine, "num_workers": num_workers or os.cpu_count() or 1, "show_progress": show_progress}
    with replacing_directory(output_dir) as replacement:
        previous = _check_output(output_dir)
        tracks, findings = _read_folders(data_dirs, options, show_progress)
        tracks, copies = _reject_copies(tracks)
        findings += copies
        measurements: dict[str, Measurements] = {}
        near_duplicates: list[tuple[str, str, float]] = []
        if options.validate_audio:
            tracks, measurements, near_duplicates, found = _validate(tracks, options, run)
            findings += found
        estimates: dict[str, dict] = {}
        if options.auto_tag:
            tracks, estimates = _estimate(tracks, run)
        if options.captioner is not None:
            tracks, found = caption_tracks(tracks, options.captioner, show_progress=show_progress)
            findings += found
        while True:
            kept = _divide(tracks, near_duplicates, options)
            report, content = describe(output_dir, data_dirs, options, kept, findings, measurements, estimates)
            if _as_text(content) == previous:
                return replace(report, reused=True)
            try:
                with replacement() as new:
                    _write(new, report, content, link=options.link, show_progress=show_progress)
                return report
            except TrackChanged as changed:
                lost = kept[changed.index][0]
                findings.append(Finding(lost.id, "error", str(changed)))
                tracks = [track for track in tracks if track.id != lost.id]


def _check_output(output_dir: Path) -> str | None:
    """The text of the report that a complete earlier build left, None where nothing is; anything else is not ours."""
    from datasets import load_from_disk

    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return None
    try:
        text = (output_dir / REPORT_NAME).read_text(encoding="utf-8")
        report = json.loads(text)
        ours = report["fingerprint"] and isinstance(report["tracks"], list)
        if ours and any((output_dir / name).is_file() for name in ("state.json", "dataset_dict.json")):
            try:
                load_from_disk(str(output_dir))
            except Exception:  # datasets raises many types for a damaged directory; it is written anew
                return ""
            return text if all((output_dir / name).is_file() for name in (PAGE_NAME, CARD_NAME)) else ""
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a report of somebody else's, or none
    raise UsageError(f"--output-dir {output_dir} holds something that is not a dataset of ours; name another.")


def _read_folders(
    data_dirs: Sequence[str | Path], options: BuildOptions, show_progress: bool
) -> tuple[list[Track], list[Finding]]:
    tracks, findings, failures = [], [], []
    names: Counter[str] = Counter()
    for location in data_dirs:
        folder = local_copy(str(location), show_progress=show_progress)
        prefix = ""
        if len(data_dirs) > 1:
            names[folder.name] += 1
            number = names[folder.name]
            prefix = f"{folder.name} ({number})/" if number > 1 else f"{folder.name}/"
        try:
            found, problems = load_tracks(
                folder,
                min_duration_s=options.min_duration_s,
                genre_from_folder=options.genre_from_folder,
                judge_tags=False,
                show_progress=show_progress,
            )
        except UsageError as error:
            failures.append(str(error))
            continue
        tracks += [replace(track, id=prefix + track.id) for track in found]
        findings += [
            Finding(prefix + problem.track, "error" if problem.skipped else "warning", problem.reason)
            for problem in problems
        ]
    if failures:
        raise UsageError("; ".join(failures))
    return tracks, findings


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


def _validate(tracks: list[Track], options: BuildOptions, run: dict) -> tuple[list, dict, list, list[Finding]]:
    """The tracks that are sound, their measurements, pairs that sound the same, and what was found."""
    kept, measurements, fingerprints, findings = [], {}, {}, []
    for track, result in zip(tracks, examine_tracks(tracks, **run), strict=True):
        if isinstance(result, AudioError):
            findings.append(Finding(track.id, "error", str(result)))
            continue
        found = judge(track.id, result.measurements, sample_rate=track.sample_rate, channels=track.channels)
        findings += found
        if not any(finding.severity == "error" for finding in found):
            kept.append(track)
            measurements[track.id] = result.measurements
            fingerprints[track.id] = result.fingerprint
    pairs = find_near_duplicates(fingerprints)
    copies = set()
    for original, copy, similarity in pairs:
        if options.drop_near_duplicates and original in copies:
            continue
        severity = "error" if options.drop_near_duplicates else "warning"
        reason = f"it sounds the same as {original} ({100 * similarity:.0f} % of its acoustic fingerprint)"
        findings.append(Finding(copy, severity, reason))
        copies.add(copy)
    if options.drop_near_duplicates:
        kept = [track for track in kept if track.id not in copies]
        pairs = []
    return kept, measurements, pairs, findings


def _estimate(tracks: list[Track], run: dict) -> tuple[list[Track], dict[str, dict]]:
    """Fill in missing BPM and keys; also returns what was estimated, by track."""
    missing = [track for track in tracks if track.bpm is None or track.keyscale is None]
    filled, estimates = {}, {}
    for track, tags in zip(missing, estimate_tracks(missing, **run), strict=True):
        if tags is not None:
            filled[track.id], estimates[track.id] = fill_missing(track, tags)
    return [filled.get(track.id, track) for track in tracks], estimates


def _divide(
    tracks: list[Track], near_duplicates: list[tuple[str, str, float]], options: BuildOptions
) -> list[tuple[Track, str]]:
    """(track, split) of each, with its sampling weight."""
    place = {track.id: index for index, track in enumerate(tracks)}
    groups = _connected([(place[a], place[b]) for a, b, _ in near_duplicates if a in place and b in place])
    held = choose_holdout([(track.genre, track.sha256) for track in tracks], options.holdout, groups)
    train = [track for index, track in enumerate(tracks) if index not in held]
    weights = dict(
        zip(
            (track.id for track in train),
            sampling_weights([track.genre for track in train], [track.repeats for track in train], options.balance),
            strict=True,
        )
    )
    return [
        (replace(track, sampling_weight=weights.get(track.id, 1.0)), "test" if index in held else "train")
        for index, track in enumerate(tracks)
    ]


def _connected(pairs: list[tuple[int, int]]) -> list[list[int]]:
    """Groups of whatever is joined by a chain of pairs."""
    group: dict[int, list[int]] = {}
    for a, b in pairs:
        left, right = group.setdefault(a, [a]), group.setdefault(b, [b])
        if left is not right:
            left += right
            group.update((member, left) for member in right)
    return list({id(members): members for members in group.values()}.values())


def _as_text(content: dict) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False)


def _write(new: Path, report: BuildReport, content: dict, *, link: bool, show_progress: bool) -> None:
    """Write data and reports into the folder `new`."""
    held = {track.id for track in report.held_out}
    by_id = {track.id: track for track in (*report.tracks, *report.held_out)}
    numbered = [(index, by_id[row["id"]]) for index, row in enumerate(content["tracks"])]
    splits = {"train": [entry for entry in numbered if entry[1].id not in held]}
    if held:
        splits["test"] = [entry for entry in numbered if entry[1].id in held]
    with progress_bar(desc="Writing", unit="B", unit_scale=True, disable=not show_progress) as bar:
        write_splits(new, splits, link=link, advance=bar.update)
    audio_urls = {
        track.id: quote(os.path.relpath(track.audio.absolute(), report.output_dir.absolute()))
        for _, track in numbered
        if isinstance(track.audio, Path)
    }
    (new / REPORT_NAME).write_text(_as_text(content), encoding="utf-8")
    (new / PAGE_NAME).write_text(render_report(content, audio_urls), encoding="utf-8")
    (new / CARD_NAME).write_text(render_card(content), encoding="utf-8")
