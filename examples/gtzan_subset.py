#!/usr/bin/env python
"""Take the same number of tracks from each genre of GTZAN, or of any folder laid out like it.

GTZAN (Tzanetakis and Cook 2002) has ten folders named by genre with 100 clips of 30 s each:

    genres_original/blues/blues.00000.wav … blues.00099.wav
    genres_original/classical/…

Nine of each are the 90 tracks of the leave-one-out baseline:

    python examples/gtzan_subset.py genres_original gtzan_90 --per-genre 9
    python scripts/build_multi_style_dataset.py --data-dir gtzan_90 --output-dir gtzan_90_dataset \\
        --validate-audio --genre-from-folder

The clips are linked, not copied. Those that can't be read (the published archive has one, jazz.00054.wav) are named
and the next one is taken.
"""

import argparse
import shlex
from pathlib import Path

from acestep_pipeline.data.audio import AudioError, probe_audio
from acestep_pipeline.data.tracks import find_audio_files
from acestep_pipeline.errors import UsageError, one_sentence_errors


def choose(genre: Path, count: int) -> list[Path]:
    """The first `count` readable clips of a genre's folder, in the order of their names.

    Raises:
        UsageError: there are fewer.
    """
    chosen: list[Path] = []
    for file in find_audio_files(genre):
        if len(chosen) == count:
            break
        try:
            probe_audio(file)
            chosen.append(file)
        except AudioError as error:
            print(f"  passed over {file}: {error}")
    if len(chosen) < count:
        raise UsageError(f"{genre} has only {len(chosen)} readable clips; lower --per-genre {count}.")
    return chosen


def link_subset(source: Path, output: Path, per_genre: int) -> dict[str, int]:
    """Link `per_genre` clips of every genre into a new folder of the same layout; returns the clips of each.

    Raises:
        UsageError: there is no folder of a genre, one has too few readable clips, or `output` exists.
    """
    genres = sorted(path for path in source.glob("*") if path.is_dir())
    if per_genre < 1 or not genres:
        raise UsageError(f"{source} needs a folder for each genre, and --per-genre must be at least 1.")
    if output.exists():
        raise UsageError(f"{output} exists; name a new folder.")
    chosen = {genre.name: choose(genre, per_genre) for genre in genres}
    for name, files in chosen.items():
        (output / name).mkdir(parents=True)
        for file in files:
            (output / name / file.name).symlink_to(file.resolve())
    return {name: len(files) for name, files in chosen.items()}


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder with one folder for each genre")
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--per-genre", type=int, default=9, help="clips of each genre (default: 9)")
    return parser.parse_args(input_args)


def main(input_args: list[str] | None = None) -> None:
    args = parse_args(input_args)
    with one_sentence_errors():
        counts = link_subset(args.source, args.output, args.per_genre)
    print(f"Linked {sum(counts.values())} clips of {len(counts)} genres in {args.output}. Next:")
    print(
        f"  python scripts/build_multi_style_dataset.py --data-dir {shlex.quote(str(args.output))} "
        f"--output-dir {shlex.quote(f'{args.output}_dataset')} --validate-audio --genre-from-folder"
    )


if __name__ == "__main__":
    main()
