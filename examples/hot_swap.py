"""One prompt in every style: adapters stay loaded, and which of them act changes within milliseconds.

python examples/hot_swap.py --adapter jazz=output/jazz --adapter lofi=output/lofi --prompt "a slow blues"
"""

import time

from adapter_options import generate, load, parser, save

from acestep_pipeline.errors import one_sentence_errors


def parse_args(input_args: list[str] | None = None):
    return parser(__doc__).parse_args(input_args)


def main(input_args: list[str] | None = None) -> None:
    args = parse_args(input_args)
    with one_sentence_errors():
        pipeline, names = load(args, at_least=2)
        prompts = (args.prompt or ["a slow blues"])[:1]
        first, second = names[:2]
        choices = {name: ([name], [1.0]) for name in names}
        choices[f"{first}-and-{second}"] = ([first, second], [0.7, 0.4])
        choices["neither"] = (names, 0.0)
        for label, (chosen, weights) in choices.items():
            start = time.perf_counter()
            pipeline.set_adapters(chosen, weights)
            print(f"{label}: switched in {1000 * (time.perf_counter() - start):.1f} ms")
            save(args, label, generate(pipeline, args, prompts)[0])
        # The second takes over from the first after 40 % of the steps.
        schedule = {first: [(0.0, 1.0), (0.4, 0.0)], second: [(0.4, 1.0)]}
        save(args, f"{first}-then-{second}", generate(pipeline, args, prompts, adapter_schedule=schedule)[0])


if __name__ == "__main__":
    main()
