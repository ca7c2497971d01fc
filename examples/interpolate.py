"""From one style to another in equal steps: the weights of two adapters go from 1 and 0 to 0 and 1.

python examples/interpolate.py --adapter jazz=output/jazz --adapter lofi=output/lofi --points 5
"""

from adapter_options import generate, load, parser, save

from acestep_pipeline.errors import UsageError, one_sentence_errors


def parse_args(input_args: list[str] | None = None):
    p = parser(__doc__)
    p.add_argument("--points", type=int, default=5, help="clips, both ends included (default: %(default)s)")
    return p.parse_args(input_args)


def main(input_args: list[str] | None = None) -> None:
    args = parse_args(input_args)
    with one_sentence_errors():
        if args.points < 2:
            raise UsageError(f"--points must be at least 2, not {args.points}.")
        pipeline, names = load(args, at_least=2)
        first, second = names[:2]
        for point in range(args.points):
            share = point / (args.points - 1)
            pipeline.set_adapters([first, second], [1 - share, share])
            audio = generate(pipeline, args, (args.prompt or ["a slow blues"])[:1])
            save(args, f"{point}-{first}-{1 - share:.2f}-{second}-{share:.2f}", audio[0])


if __name__ == "__main__":
    main()
