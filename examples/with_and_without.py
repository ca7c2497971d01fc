"""A/B: each prompt with the adapter and without it, from the same noise, and how far apart they are.

python examples/with_and_without.py --adapter jazz=output/jazz --prompt "a slow blues" --prompt "solo piano"
"""

from adapter_options import generate, load, parser, save

from acestep_pipeline.errors import one_sentence_errors


def parse_args(input_args: list[str] | None = None):
    return parser(__doc__).parse_args(input_args)


def main(input_args: list[str] | None = None) -> None:
    args = parse_args(input_args)
    with one_sentence_errors():
        pipeline, names = load(args, at_least=1)
        pipeline.set_adapters(names)
        prompts = args.prompt or ["a slow blues"]
        a = generate(pipeline, args, prompts)
        pipeline.disable_lora()  # the base model, to the bit
        b = generate(pipeline, args, prompts)
        pipeline.enable_lora()
        for number in range(len(prompts)):
            save(args, f"{number}-A-with", a[number])
            save(args, f"{number}-B-without", b[number])
            difference = (a[number] - b[number]).square().mean().sqrt() / b[number].square().mean().sqrt()
            print(f"{prompts[number]!r}: the difference is {difference:.0%} of the loudness (RMS) of B")


if __name__ == "__main__":
    main()
