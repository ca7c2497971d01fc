"""Flags that are spelt otherwise than their parser has them."""

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn


def accept_either_dash(parser: argparse.ArgumentParser) -> None:
    """Read `--data-dir` as `--data_dir` and the other way round, in subcommands, too; `--help` shows one."""
    flags = parser._option_string_actions
    for flag in flags_of(parser):
        flags.setdefault("--" + flag[2:].replace("-", "_"), flags[flag])
        flags.setdefault("--" + flag[2:].replace("_", "-"), flags[flag])
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                accept_either_dash(command)


def refuse_unknown(parser: argparse.ArgumentParser, unknown: Sequence[str], flags: Sequence[str]) -> NoReturn:
    """End with status 2 over the arguments that nobody reads, with what was probably meant of `flags`."""
    said = f"unrecognized arguments: {' '.join(unknown)}"
    names = [argument.partition("=")[0] for argument in unknown if argument.startswith("--")]
    meant = [close for name in names for close in difflib.get_close_matches(name, flags, 1)]
    if meant:
        said += f"; did you mean {' and '.join(dict.fromkeys(meant))}?"
    parser.error(said)


def flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """The long flags of a parser, as `--help` shows them, without those of its subcommands."""
    return [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
