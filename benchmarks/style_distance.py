"""How often the style distance tells a set of clips' own style from another, by the number of clips.

    python benchmarks/style_distance.py --music-dir free_music [--output RESULT.json]

`--music-dir` has a folder for each style, with a dozen tracks or more (`examples/fetch_free_music.sh` fetches three
such). From the middle of each track 30 s are taken. A set of clips of a style is right if it is nearer to all other
clips of its style than a set of another style is. Several sets are drawn for each pair of styles.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np

from acestep_pipeline.data.audio import AUDIO_SUFFIXES, read_audio
from acestep_pipeline.errors import UsageError, one_sentence_errors
from acestep_pipeline.progress import progress_bar
from acestep_pipeline.training.style_distance import frechet_distance, style_features

RATE = 48_000
CLIP_S = 30
SIZES = (2, 3, 4, 6, 8, 10)
DRAWS = 60
MIN_TRACKS = 12


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--music-dir", type=Path, required=True, help="a folder of tracks for each style")
    parser.add_argument("--output", type=Path, help="write the table here, as JSON")
    return parser.parse_args(input_args)


def read_styles(directory: Path) -> dict[str, list[np.ndarray]]:
    """The points of the middle of every track that is long enough, by style; styles of enough tracks."""
    folders = sorted(path for path in directory.iterdir() if path.is_dir())
    files = [file for folder in folders for file in sorted(folder.iterdir()) if file.suffix.lower() in AUDIO_SUFFIXES]
    styles: dict[str, list[np.ndarray]] = {}
    for file in progress_bar(iterable=files, desc="Measuring", unit="track"):
        waveform = read_audio(file, sample_rate=RATE)
        start = (waveform.shape[1] - CLIP_S * RATE) // 2
        if start >= 0:
            points = style_features(waveform[:, start : start + CLIP_S * RATE], RATE)
            styles.setdefault(file.parent.name, []).append(points)
    styles = {name: clips for name, clips in styles.items() if len(clips) >= MIN_TRACKS}
    if len(styles) < 2:
        raise UsageError(f"--music-dir {directory} needs two folders of {MIN_TRACKS} tracks of {CLIP_S} s or more.")
    return styles


def compare(styles: dict[str, list[np.ndarray]], size: int) -> dict[str, float]:
    """Distances of sets of `size` clips to their own style's other clips and to another style's, over all pairs."""
    generator = np.random.default_rng(size)
    own, other = [], []
    for a, b in itertools.permutations(styles, 2):
        scale = np.concatenate(styles[a]).std(0)
        for _ in range(DRAWS):
            order = generator.permutation(len(styles[a]))
            rest = np.concatenate([styles[a][index] for index in order[size:]]) / scale
            of_b = generator.permutation(len(styles[b]))[:size]
            for found, clips in ((own, [styles[a][i] for i in order[:size]]), (other, [styles[b][i] for i in of_b])):
                found.append(frechet_distance(np.concatenate(clips) / scale, rest))
    return {
        "clips": size,
        "right": round(float(np.mean(np.array(own) < np.array(other))), 3),
        **{
            f"{name}, {percent} %": round(float(np.percentile(found, percent)), 1)
            for name, found in (("own", own), ("other", other))
            for percent in (5, 50, 95)
        },
    }


def main(args: argparse.Namespace) -> None:
    styles = read_styles(args.music_dir)
    smallest = min(map(len, styles.values()))
    result = {
        "command": "benchmarks/style_distance.py",
        "tracks": {name: len(clips) for name, clips in styles.items()},
        "table": [compare(styles, size) for size in SIZES if size <= smallest - 2],
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    with one_sentence_errors(debug="--debug" in sys.argv):
        main(parse_args())
