"""Pages that say what results say: what a script puts between its marks there, and `--check`, which only compares."""

import argparse
from collections.abc import Callable
from pathlib import Path

from acestep_pipeline.errors import RunError
from acestep_pipeline.files import write_text
from benchmarks.results_file import ROOT

README, TRAINING_PAGE = ROOT / "README.md", ROOT / "docs" / "training.md"
END = "<!-- up to here -->"


def write_pages(script: str, about: str, pages: dict[Path, Callable[[], str]], argv: list[str] | None) -> bool:
    """The command line of `script`, whose help is `about`: write what belongs into each page, or compare it.

    Returns:
        Whether `--check` was given.

    Raises:
        RunError: as `write_tables`.
    """
    p = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="only say whether the pages are what the results say")
    check = p.parse_args(argv).check
    for page, text in pages.items():
        write_tables(script, text(), page=page, check=check)
    return check


def write_tables(script: str, text: str, *, page: Path, check: bool) -> None:
    """Put `text` between the marks of `script` in a page, or only compare it.

    Raises:
        RunError: the page has no such marks, or, with `check`, something else between them.
    """
    found = page.read_text(encoding="utf-8")
    before, begin, rest = found.partition(f"<!-- {script} writes this -->")
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise RunError(f"{page.name} has no place for what {script} writes.")
    wanted = f"{before}{begin}\n{text}\n{end}{after}"
    if check and found != wanted:
        raise RunError(f"{page.name} is not what benchmarks/results says: run python {script}.")
    if not check:
        write_text(page, wanted)
