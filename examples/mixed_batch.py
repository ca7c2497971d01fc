"""One batch, an adapter for each prompt: as a service would answer several users at once.

python examples/mixed_batch.py --adapter jazz=output/jazz --adapter lofi=output/lofi
"""

from adapter_options import generate, load, parser, save

from acestep_pipeline.errors import one_sentence_errors


def parse_args(input_args: list[str] | None = None):
    return parser(__doc__).parse_args(input_args)


def main(input_args: list[str] | None = None) -> None:
    args = parse_args(input_args)
    with one_sentence_errors():
        pipeline, names = load(args, at_least=1)
        # Each at full and at half strength, and one prompt without any.
        choices = [*names, *((name, 0.5) for name in names), None]
        labels = [*names, *(f"{name}-half" for name in names), "without"]
        prompts = args.prompt or ["a slow blues", "fast drums and a wide, bright, very long pad", "solo piano"]
        prompts = [prompts[number % len(prompts)] for number in range(len(choices))]
        audio = generate(pipeline, args, prompts, adapters=choices)
        for number, label in enumerate(labels):
            save(args, f"{number}-{label}", audio[number])


if __name__ == "__main__":
    main()
