"""What a dataset build was asked for and what it did: its options, and the report as a record, as JSON, as lines."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ...errors import UsageError
from ...paths import without_secrets
from ...prompt_fields import INSTRUMENTAL
from ...storage.copies import is_remote
from ...version import __version__
from ..tracks import Track, dataset_fingerprint, describe_missing_tags
from .analysis import Finding, Measurements
from .auto_tags import require_librosa
from .captioners import load_captioner
from .dataset_files import columns_of
from .report_text import NO_GENRE, group_findings

REPORT_NAME, PAGE_NAME, CARD_NAME = "report.json", "report.html", "dataset_card.md"
RECOMMENDED_TAGS = (5, 10)
SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class BuildOptions:
    """What a build does beyond reading and packing.

    `validate_audio`: decode every file completely, measure it, reject what is damaged or silent, name near-duplicates.
    `genre_from_folder`: a track whose genre no sidecar or table gives takes its folder's name.
    `min_duration_s`: shorter tracks are rejected.
    `auto_tag`: estimate missing BPM and key. `captioner`: "module:function" that describes tracks without tags.
    `balance`, `holdout`: as `splits` takes them. `link`: reference audio files instead of embedding them.
    `drop_near_duplicates`: reject what sounds the same as a track before it.
    """

    validate_audio: bool = False
    genre_from_folder: bool = False
    min_duration_s: float = 2.0
    auto_tag: bool = False
    captioner: str | None = None
    balance: float = 0.0
    holdout: float = 0.0
    link: bool = False
    drop_near_duplicates: bool = False

    def check(self) -> None:
        """Raises `UsageError` for values that can't work, before any work starts."""
        if not 0 <= self.balance <= 1:
            raise UsageError(f"--balance must be in [0, 1], not {self.balance:g}.")
        if not 0 <= self.holdout < 1:
            raise UsageError(f"--holdout must be in [0, 1), not {self.holdout:g}.")
        if not 0 <= self.min_duration_s < float("inf"):
            raise UsageError(f"--min-duration-s must not be negative, not {self.min_duration_s:g}.")
        if self.drop_near_duplicates and not self.validate_audio:
            raise UsageError("--drop-near-duplicates needs --validate-audio, which is what finds them.")
        if self.auto_tag:
            require_librosa()
        if self.captioner is not None:
            load_captioner(self.captioner)


@dataclass(frozen=True)
class BuildReport:
    """What a build did: the tracks taken, those held out, every finding, and the fingerprint of what is trained on."""

    output_dir: Path
    tracks: list[Track]
    held_out: list[Track]
    findings: list[Finding]
    fingerprint: str
    reused: bool

    @property
    def rejected(self) -> list[Finding]:
        """The findings for which a track is left out."""
        return [finding for finding in self.findings if finding.severity == "error"]


def describe(
    output_dir: Path,
    data_dirs: Sequence[str | Path],
    options: BuildOptions,
    kept: list[tuple[Track, str]],
    findings: list[Finding],
    measurements: dict[str, Measurements],
    estimates: dict[str, dict],
) -> tuple[BuildReport, dict]:
    """The report, and the content of its JSON file."""
    if not kept:
        reasons = [f"{finding.track}: {finding.reason}" for finding in findings if finding.severity == "error"]
        more = f"; and {len(reasons) - 40} more" if len(reasons) > 40 else ""
        raise UsageError(f"no track in {', '.join(map(str, data_dirs))} is usable: {'; '.join(reasons[:40])}{more}.")
    tracks = [track for track, _ in kept]
    findings = findings + [Finding(track.id, "warning", reason) for track in tracks for reason in _judge_tags(track)]
    findings.sort(key=lambda finding: (SEVERITIES.index(finding.severity), finding.track))
    report = BuildReport(
        output_dir,
        tracks=[track for track, split in kept if split == "train"],
        held_out=[track for track, split in kept if split == "test"],
        findings=findings,
        fingerprint=dataset_fingerprint([track for track, split in kept if split == "train"]),
        reused=False,
    )
    rows = []
    for track, split in kept:
        row = columns_of(track)
        row["has_lyrics"] = row.pop("lyrics") != INSTRUMENTAL
        row |= {"split": split, "estimates": estimates.get(track.id, {})}
        rows.append(row | {"measured": measurements[track.id].as_dict() if track.id in measurements else None})
    content = {
        "version": __version__,
        "fingerprint": report.fingerprint,
        "validated": options.validate_audio,
        "sources": [_source_name(location) for location in data_dirs],
        "options": asdict(options),
        "genres": _count_genres(report),
        "findings": [asdict(finding) for finding in findings],
        "tracks": rows,
    }
    return report, content


def _source_name(location: str | Path) -> str:
    return without_secrets(str(location)) if is_remote(str(location)) else Path(location).absolute().name


def _judge_tags(track: Track) -> Iterator[str]:
    missing = describe_missing_tags(track)
    yield from missing
    count = len(track.tags.split(","))
    if not missing and count < RECOMMENDED_TAGS[0]:
        tags = "tag" if count == 1 else "tags"
        yield f"it has {count} {tags}; {RECOMMENDED_TAGS[0]} to {RECOMMENDED_TAGS[1]} describe a track well"


def _count_genres(report: BuildReport) -> dict[str, dict]:
    """Tracks and minutes of each genre, the longest first, and its training tracks' mean visits an epoch."""
    counts, minutes, trained, visits = Counter(), Counter(), Counter(), Counter()
    for track in (*report.tracks, *report.held_out):
        genre = track.genre or NO_GENRE
        counts[genre] += 1
        minutes[genre] += track.duration_s / 60
    for track in report.tracks:
        trained[track.genre or NO_GENRE] += 1
        visits[track.genre or NO_GENRE] += track.sampling_weight * track.repeats
    return {
        genre: {
            "tracks": counts[genre],
            "minutes": round(total, 2),
            "weight": round(visits[genre] / trained[genre], 4),
        }
        for genre, total in minutes.most_common()
    }


def describe_build(report: BuildReport, *, limit: int = 40) -> str:
    """The findings, minutes by genre, and what was written, for a person.

    Rejections stand one by one (the first `limit`), warnings and notes that differ only in numbers together.
    """
    names = [{"id": track.id} for track in (*report.tracks, *report.held_out)]
    lines = []
    for kind in group_findings({"findings": [asdict(finding) for finding in report.findings], "tracks": names}):
        for group in kind["groups"]:
            found = group["findings"]
            if kind["severity"] == "error" or len(found) == 1:
                word = "rejected" if kind["severity"] == "error" else kind["severity"]
                lines += [f"  {word:<9}{finding['track']}: {finding['reason']}" for finding in found[:limit]]
                lines += [f"  {word:<9}… and {len(found) - limit} more"] * (len(found) > limit)
            else:
                lines.append(f"  {kind['severity']:<9}{len(found)} × {group['reason']} ({found[0]['track']}, …)")
    for genre, total in _count_genres(report).items():
        weight = f", each heard {total['weight']:.2f} times an epoch" if total["weight"] != 1 else ""
        lines.append(f"  {genre:<24}{total['tracks']:>5} tracks {total['minutes']:>8.1f} min{weight}")
    state = "is up to date" if report.reused else "was written"
    held = f", {len(report.held_out)} held out" if report.held_out else ""
    rejected = len({finding.track for finding in report.rejected})
    lines.append(f"{report.output_dir} {state}: {len(report.tracks)} tracks{held}, {rejected} rejected.")
    lines.append(f"Look and listen: {report.output_dir / PAGE_NAME}")
    return "\n".join(lines)
