"""Render the offline demo dataset: short clips in six styles, with tags, tempo, key and licence beside each.

python examples/make_demo_dataset.py data/demo
"""

import argparse
import shlex
from pathlib import Path

from acestep_pipeline.data.demo_music import render_demo_dataset
from acestep_pipeline.errors import one_sentence_errors


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder to create; it must not hold anything else")
    parser.add_argument("--num_clips", type=int, default=6, help="clips to render; the styles take turns (default: 6)")
    parser.add_argument("--duration_s", type=float, default=12.0, help="seconds a clip (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="varies keys, tempos, melodies and drums (default: 0)")
    return parser.parse_args(input_args)


def main(input_args: list[str] | None = None) -> None:
    args = parse_args(input_args)
    with one_sentence_errors():
        clips = render_demo_dataset(
            args.directory, num_clips=args.num_clips, duration_s=args.duration_s, seed=args.seed
        )
    print(f"{len(clips)} clips of {args.duration_s:g} s are in {args.directory}. Train on them with:")
    print(
        "  accelerate launch train_ace_step_lora.py --preset smoke --pretrained_model_name_or_path tiny "
        f"--train_data_dir {shlex.quote(str(args.directory))}"
    )


if __name__ == "__main__":
    main()
