#!/usr/bin/env python
"""Writes the figures of docs/scaling.md, and its picture, from `results/scaling.json`.

    python benchmarks/scaling_page.py          into docs/scaling.md and docs/scaling.png
    python benchmarks/scaling_page.py --check  exit status 1 if they say something else

The picture says in its metadata which results it was drawn from.
"""

import hashlib
import json
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acestep_pipeline.errors import RunError, one_sentence_errors
from benchmarks.pages import write_pages
from benchmarks.results_file import ROOT
from benchmarks.scaling import FILE

PAGE, PICTURE = ROOT / "docs" / "scaling.md", ROOT / "docs" / "scaling.png"
SCRIPT = "benchmarks/scaling_page.py"
MILLION = 1_000_000
# Of real time, the target for an H100.
ENCODING_SPEED = 200


def main(argv: list[str] | None = None) -> None:
    """Write page and picture, or compare them."""
    results = FILE.read_bytes()
    check = write_pages(SCRIPT, __doc__, {PAGE: lambda: text(json.loads(results))}, argv)
    drawn_from = hashlib.sha256(results).hexdigest()
    if not check:
        draw(json.loads(results), PICTURE, drawn_from=drawn_from)
    elif drawn_from.encode() not in PICTURE.read_bytes():
        raise RunError(f"{PICTURE.name} is not drawn from benchmarks/results: run python {SCRIPT}.")


def text(result: dict) -> str:
    """Everything up to the plan's list."""
    most = result["tracks"][-1]
    sent = result["processes"]["sent_mb_an_update"]
    lines = [
        f"Measured on {result.get('hardware', 'two busy CPU cores')}; nothing here was run on a GPU.",
        "",
        "![Planning time and memory by tracks; operations and memory by length and rank](scaling.png)",
        "",
        "## Tracks (measured, simulated cache)",
        "",
        "| tracks of a minute | records | plan of the first epoch | of the next (quartiles) | its memory "
        "| growth in 100 batches (quartiles) |",
        "|---|---|---|---|---|---|",
        *map(tracks_line, result["tracks"]),
        "",
        wrapped(
            f"Records and plan grow with the tracks, about {track_kb(most):.1f} kB each; reading does not: a batch "
            "maps the files of its own windows and nothing else. At the start every cached file is read and its "
            f"SHA-256 compared: {result['checking_a_cached_track_ms']:.1f} ms a track."
        ),
        "",
        "## Length, rank and processes (2 B, one window, bf16, checkpointing, AdamW; by formula)",
        "",
        "| window | TFLOP | GB |",
        "|---|---|---|",
        *(f"| {row['seconds']} s | {row['tflop']:.1f} | {row['gb']:.1f} |" for row in result["length"]),
        "",
        "| rank, 60 s | adapter | TFLOP | GB | gradients |",
        "|---|---|---|---|---|",
        *map(rank_line, result["rank"]),
        "",
        wrapped(
            "Attention in every second block grows with the square of the window, and windows, not songs, decide. At "
            f"rank 64 a process sends {sent['2']:.0f} MB an update with 2 processes and {sent['8']:.0f} MB with 8 (a "
            "ring: twice the gradients less its own share). The embedded checkpoint on this CPU, four windows of 10 s "
            f"in an update: {update_time(result, '1')} with one process, {update_time(result, '2')} with two (gloo)."
        ),
        "",
        "## 1,000,000 tracks on S3",
        "",
        wrapped(
            "The music itself need not fit on any disk: with `--streaming` each file is fetched when it is encoded "
            "([data](data.md#music-on-s3-or-the-hub)). The rest is not built; what would have to be, by the figures "
            "above (times ten where they grow with the tracks)."
        ),
        "",
        *plan_table(result),
    ]
    return "\n".join(lines)


def wrapped(paragraph: str) -> str:
    """Lines as long as the page's."""
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False)


def tracks_line(row: dict) -> str:
    """A line of the first table; what an older results file lacks is blank."""
    plan, growth = row.get("plan_of_next_epochs_s"), row.get("growth_over_100_batches_mb")
    cells = [
        f"{row['tracks']:,}",
        f"{row['records_mb']:.1f} MB",
        f"{1000 * row['plan_of_first_epoch_s']:,.1f} ms",
        "{median:,.1f} ms ({q1:,.1f}–{q3:,.1f})".format(**{k: 1000 * v for k, v in plan.items()}) if plan else "",
        f"{row['plan_mb']:.1f} MB",
        "{median:z.2f} MB ({q1:z.2f} to {q3:z.2f})".format(**growth) if growth else "",
    ]
    return f"| {' | '.join(cells)} |"


def rank_line(row: dict) -> str:
    """A line of the table of ranks."""
    adapter = f"{row['adapter_parameters'] / 1e6:.1f} M"
    return f"| {row['rank']} | {adapter} | {row['tflop']:.1f} | {row['gb']:.1f} | {row['gradients_mb']:.0f} MB |"


def track_kb(row: dict) -> float:
    """kB of a track's records and plan."""
    return 1000 * (row["records_mb"] + row["plan_mb"]) / row["tracks"]


def update_time(result: dict, processes: str) -> str:
    """Of an update on so many processes."""
    quartiles = result["processes"].get("quartiles_s_an_update")
    if quartiles is None:
        return f"{result['processes']['measured_s_an_update'][processes]:.3f} s"
    return "{median:.3f} s ({q1:.3f}–{q3:.3f})".format(**quartiles[processes])


def plan_table(result: dict) -> list[str]:
    """What a million tracks of a minute would take."""
    most, track_mb = result["tracks"][-1], result["bytes_of_a_cached_track"] / 1e6
    records_gb = MILLION / most["tracks"] * most["records_mb"] / 1e3
    one_plan_s = most.get("plan_of_next_epochs_s", {"median": most["plan_of_first_epoch_s"]})["median"]
    plan_s = MILLION / most["tracks"] * one_plan_s
    checking_h = MILLION * result["checking_a_cached_track_ms"] / 3.6e6
    encoding_h = MILLION / 60 / ENCODING_SPEED
    rows = [
        (
            f"size of the cache ({track_mb:.2f} MB a track: latents in float32, one condition of 200 tokens)",
            f"{MILLION * track_mb / 1e6:.2f} TB in 2,000,000 files",
            "first: no local disk holds it, and listing it takes a while",
        ),
        ("check of every file at the start", f"{checking_h:.1f} h in one process", "first, too"),
        (
            "records, in every process",
            f"{records_gb:.1f} GB",
            f"a machine with 8 processes holds {8 * records_gb:.0f} GB of them",
        ),
        ("plan of an epoch, in the loop", f"{plan_s:.0f} s", "no: an epoch is 250,000 updates of four"),
        (
            f"encoding, at {ENCODING_SPEED} times real time (the target for an H100, not measured)",
            f"{encoding_h:.0f} GPU hours",
            "divides among processes",
        ),
    ]
    return [
        "| what | at 1,000,000 tracks of a minute | breaks |",
        "|---|---|---|",
        *(f"| {' | '.join(r)} |" for r in rows),
    ]


def draw(result: dict, path: Path, *, drawn_from: str) -> None:
    """Four panels: tracks (time, memory), length, rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((time_axis, memory_axis), (length_axis, rank_axis)) = pyplot.subplots(2, 2, figsize=(10, 7))
    numbers = [row["tracks"] for row in result["tracks"]]
    for key, label in (
        ("plan_of_first_epoch_s", "plan of an epoch"),
        ("planner_s", "planner"),
        ("records_s", "records"),
    ):
        time_axis.loglog(numbers, [row[key] for row in result["tracks"]], "o-", label=label)
    time_axis.set(xlabel="tracks", ylabel="s", title="Planning (measured)")
    for key, label in (("records_mb", "records"), ("plan_mb", "plan")):
        memory_axis.semilogx(numbers, [row[key] for row in result["tracks"]], "o-", label=label)
    growth = [row.get("growth_over_100_batches_mb") for row in result["tracks"]]
    if all(growth):
        memory_axis.semilogx(numbers, [row["median"] for row in growth], "o-", label="100 batches read")
    memory_axis.set(xlabel="tracks", ylabel="MB", title="Memory of the data path (measured)")
    for axis, rows, key in ((length_axis, result["length"], "seconds"), (rank_axis, result["rank"], "rank")):
        values = [row[key] for row in rows]
        axis.loglog(values, [row["tflop"] for row in rows], "o-", label="TFLOP an update")
        axis.loglog(values, [row["gb"] for row in rows], "s-", label="GB at the peak")
        axis.set(xlabel={"seconds": "window, s", "rank": "rank"}[key], title="2 B, one window (formula)")
    for axis in figure.axes:
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=80, metadata={"Description": f"drawn from results {drawn_from}"})


if __name__ == "__main__":
    with one_sentence_errors():
        main()
