"""The Python half of fetch_free_music.sh: picks the tracks of an unpacked package and describes each one.

describe_free_music.py add UNPACKED_DIR STYLE_DIR --style metal --package NAME --version V [--max_tracks N]
describe_free_music.py check STYLE_DIR [--max_tracks N]        exit status 0 if `add` would have nothing to do
describe_free_music.py summary STYLE_DIR...
"""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import soundfile as sf

from acestep_pipeline.errors import RunError, UsageError, one_sentence_errors

AUDIO_SUFFIXES = {".flac", ".mp3", ".ogg", ".opus", ".wav"}
STAMP_NAME = ".complete.json"  # written last; a style folder without it is unfinished


@dataclass(frozen=True)
class Style:
    tags: tuple[str, ...]  # what the tracks of the package have in common
    author: str  # named where a file's own tags name nobody
    licence: str  # SPDX identifier, from the package's copyright file
    licence_url: str


CC_BY_SA_URL = "https://creativecommons.org/licenses/by-sa/3.0/"
STYLES = {
    "electronic": Style(
        ("electronic", "ambient techno", "synthesizers", "drum machine", "futuristic", "atmospheric", "instrumental"),
        "Max McCracken",
        "CC-BY-SA-3.0",
        CC_BY_SA_URL,
    ),
    "metal": Style(
        ("metal", "symphonic gothic metal", "female vocals", "distorted electric guitars", "heavy drums", "dramatic"),
        "Obsidian Shell",
        "CC-BY-SA-3.0",
        CC_BY_SA_URL,
    ),
    "orchestral": Style(
        ("orchestral", "fantasy game soundtrack", "strings", "brass", "woodwinds", "cinematic"),
        "the Battle for Wesnoth contributors (see the copyright file)",
        "GPL-2.0-or-later",
        "https://www.gnu.org/licenses/old-licenses/gpl-2.0.html",
    ),
}
# A word of the title that names the mood adds one tag. Titles that say nothing about the sound add none.
TITLE_MOODS = {
    "battle": "battle music",
    "epic": "epic",
    "farewell": "melancholic",
    "fear": "ominous",
    "frantic": "fast",
    "king": "solemn",
    "love": "romantic",
    "minstrels": "folk dance",
    "revenge": "intense",
    "sad": "sad",
    "siege": "battle music",
    "space": "spacious",
    "suspense": "suspenseful",
    "symphony": "symphonic",
    "underground": "dark",
    "vengeful": "intense",
    "victory": "triumphant",
}


def tags_of(style: Style, file_tags: dict[str, str]) -> list[str]:
    """5–10 descriptors: the style's, the file's own genre where it says more, and the moods its title names."""
    tags = list(style.tags)
    genre = file_tags.get("genre", "").strip().lower()
    if genre and genre != "game":
        tags.insert(1, genre)
    words = file_tags.get("title", "").lower().split()
    tags += [mood for word, mood in TITLE_MOODS.items() if word in words]
    return list(dict.fromkeys(tags))[:10]


def licence_note(style: Style, file_tags: dict[str, str], package: str, version: str, source: Path) -> str:
    """What a reader needs to reuse the track: title, author, licence and where it came from; one fact a line."""
    facts = {
        "title": file_tags.get("title"),
        "author": file_tags.get("artist", style.author),
        "album": file_tags.get("album"),
        "copyright": file_tags.get("copyright"),
        "licence": f"{style.licence} ({style.licence_url})",
        "licence in the file's own tags": file_tags.get("license"),
        "package": f"{package} {version} (Debian; its copyright file lies in this folder)",
        "source file": source.as_posix(),
        "changes": "none",
    }
    return "".join(f"{name}: {value}\n" for name, value in facts.items() if value)


def write_new(path: Path, content: str) -> None:
    """Write a text file under a temporary name and rename it; one that is there already (perhaps edited) stays."""
    if not path.exists():
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_text(content, encoding="utf-8")
        temporary.rename(path)


def long_tracks(unpacked: Path, min_duration_s: float) -> list[Path]:
    """The audio files under `unpacked` that last at least `min_duration_s` seconds, by name."""
    found = (path for path in unpacked.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file())
    return sorted((path for path in found if sf.info(path).duration >= min_duration_s), key=lambda path: path.name)


def add_track(source: Path, target: Path, style: Style, *, unpacked: Path, package: str, version: str) -> None:
    """Describe and copy one track; the audio file comes last, so a track that is there has its description."""
    with sf.SoundFile(source) as file:
        file_tags = file.copy_metadata()
    note = licence_note(style, file_tags, package, version, source.relative_to(unpacked))
    write_new(target.with_suffix(".license.txt"), note)
    write_new(target.with_suffix(".tags.txt"), ", ".join(tags_of(style, file_tags)) + "\n")
    if not target.exists():
        temporary = target.with_name(f".{target.name}.part")
        shutil.copyfile(source, temporary)
        temporary.rename(target)
    elif target.stat().st_size != source.stat().st_size:
        raise UsageError(f"{target} exists and isn't the file of {package}; move it away and run again")


def add(args: argparse.Namespace) -> None:
    style = STYLES[args.style]
    tracks = long_tracks(args.unpacked, args.min_duration_s)[: args.max_tracks]
    if not tracks:
        raise RunError(f"{args.package} {args.version} holds no track of {args.min_duration_s:g} s or more")
    args.style_dir.mkdir(parents=True, exist_ok=True)
    copyright_file = args.unpacked / "usr/share/doc" / args.package / "copyright"
    write_new(args.style_dir / "copyright", copyright_file.read_text(encoding="utf-8", errors="replace"))
    targets: dict[Path, Path] = {}
    for source in tracks:
        target = args.style_dir / source.name
        if target in targets:  # two folders of the package hold files of the same name
            target = args.style_dir / f"{source.parent.name}_{source.name}"
        targets[target] = source
        add_track(source, target, style, unpacked=args.unpacked, package=args.package, version=args.version)
    stamp = {"package": args.package, "version": args.version, "max_tracks": args.max_tracks}
    temporary = args.style_dir / f"{STAMP_NAME}.part"
    temporary.write_text(json.dumps(stamp | {"tracks": [path.name for path in targets]}, indent=2), encoding="utf-8")
    temporary.rename(args.style_dir / STAMP_NAME)


def is_complete(style_dir: Path, max_tracks: int | None) -> bool:
    """Whether an earlier run brought (at least) what this one would, and all of it is still there."""
    try:
        stamp = json.loads((style_dir / STAMP_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    enough = stamp["max_tracks"] is None or (max_tracks is not None and max_tracks <= stamp["max_tracks"])
    tracks = [style_dir / name for name in stamp["tracks"]]
    wanted = [track.with_suffix(suffix) for track in tracks for suffix in (track.suffix, ".tags.txt", ".license.txt")]
    return enough and all(path.is_file() for path in wanted)


def summary(style_dirs: list[Path]) -> None:
    """Print tracks, minutes and megabytes (10^6 bytes) of each style folder, and of all."""
    rows = []
    for style_dir in style_dirs:
        names = json.loads((style_dir / STAMP_NAME).read_text(encoding="utf-8"))["tracks"]
        minutes = sum(sf.info(style_dir / name).duration for name in names) / 60
        rows.append((style_dir.name, len(names), minutes, sum((style_dir / name).stat().st_size for name in names)))
    rows.append(("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    print(f"{'style':<12}{'tracks':>8}{'minutes':>9}{'MB':>7}")
    for name, tracks, minutes, size_bytes in rows:
        print(f"{name:<12}{tracks:>8}{minutes:>9.1f}{size_bytes / 1e6:>7.1f}")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("add", help="copy and describe the tracks of an unpacked package")
    command.add_argument("unpacked", type=Path)
    command.add_argument("style_dir", type=Path)
    command.add_argument("--style", choices=sorted(STYLES), required=True)
    command.add_argument("--package", required=True)
    command.add_argument("--version", required=True)
    command.add_argument("--max_tracks", type=int, help="take only the first so many (default: all)")
    command.add_argument("--min_duration_s", type=float, default=20.0)
    command = commands.add_parser("check", help="exit status 0 if the style folder is complete, else 1")
    command.add_argument("style_dir", type=Path)
    command.add_argument("--max_tracks", type=int)
    command = commands.add_parser("summary", help="count tracks, minutes and megabytes")
    command.add_argument("style_dirs", type=Path, nargs="+")
    return parser.parse_args(input_args)


def main(input_args: list[str] | None = None) -> None:
    args = parse_args(input_args)
    with one_sentence_errors():
        if args.command == "add":
            add(args)
        elif args.command == "check":
            sys.exit(0 if is_complete(args.style_dir, args.max_tracks) else 1)
        else:
            summary(args.style_dirs)


if __name__ == "__main__":
    main()
