"""Is anything lost or mixed when the network and the server fail? Counts schedules of faults that were survived.

    python benchmarks/storage_faults.py --schedules 200 --output benchmarks/results/storage_faults.json

A real S3 server (SeaweedFS) stands behind a proxy that cuts connections before, within and after requests, answers
500 and 503, says that the credentials have expired, changes bytes and waits. In each schedule a run is published four
times through it, and pulled after each; a schedule is survived if, looked at without the proxy, the latest release
always was the old one or the new one, whole; if what was said to be published was; if every release verifies in the
end; if a pull gave exactly a release or no folder at all; and if every failure was one of the two errors that become
one sentence.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from acestep_pipeline.errors import RunError, UsageError  # noqa: E402
from acestep_pipeline.storage.publishing import find_release, publish, read_latest  # noqa: E402
from acestep_pipeline.storage.release_manifest import MANIFEST_NAME  # noqa: E402
from acestep_pipeline.storage.release_pull import pull_release  # noqa: E402
from acestep_pipeline.storage.store_care import verify  # noqa: E402
from acestep_pipeline.storage.stores import open_store  # noqa: E402
from tests.fault_proxy import faulty  # noqa: E402
from tests.s3_server import S3Server, running_s3_server  # noqa: E402

PUBLICATIONS = 4


def files_of(directory: Path) -> dict[str, bytes]:
    """A folder's files without its manifest."""
    files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != MANIFEST_NAME}


def survive(server: S3Server, directory: Path, *, seed: int, share: float) -> Counter:
    """Run one schedule; returns what happened. Raises `AssertionError` where something was lost or mixed."""
    draw = random.Random(seed)
    address, happened = f"s3://{server.bucket}/faults/{seed}", Counter()
    run = directory / f"run-{seed}"
    run.mkdir(parents=True)
    whole: list[dict[str, bytes]] = []
    with faulty(server, seed=seed, share=share) as proxy:
        for number in range(PUBLICATIONS):
            for name in ("a", "b", f"new-{number}"):
                (run / name).write_bytes(draw.randbytes(draw.choice((10, 3_000, 200_000))))
            (run / "release").write_text(str(number))
            intended = files_of(run)
            os.environ["AWS_ENDPOINT_URL"] = proxy.url
            try:
                publish(run, address, force=True, show_progress=False, num_workers=4)
                published = True
            except (UsageError, RunError) as error:
                published = False
                happened[f"push: {_kind(error, address, proxy.url)}"] += 1
            copy = directory / f"copy-{seed}-{number}"
            try:
                pull_release(address, copy, show_progress=False, num_workers=4)
                pulled = True
            except (UsageError, RunError) as error:
                pulled = False
                happened[f"pull: {_kind(error, address, proxy.url)}"] += 1
            os.environ["AWS_ENDPOINT_URL"] = server.url
            latest = read_latest(open_store(address))
            if published or (latest is not None and _names(latest[0]) == _hashes(intended)):
                whole.append(intended)
            assert (latest is None) == (not whole), "a release is gone, or there without its publisher"
            assert not whole or _names(latest[0]) == _hashes(whole[-1]), "the latest release is neither old nor new"
            assert copy.exists() == pulled, "a pull that failed left a folder, or the reverse"
            if whole:
                pull_release(address, copy, show_progress=False)  # goes on with what a failed one left
                assert files_of(copy) == whole[-1], "a pulled copy is not the release"
            happened["published"] += published
            happened["pulled"] += pulled
    if whole:
        releases, damage = verify(address, every_release=True, show_progress=False)
        assert not damage, damage
        assert len(releases) == len(whole) == find_release(open_store(address)).release
        for release, files in zip(releases, reversed(whole), strict=True):
            assert _names(release) == _hashes(files), "history is not what was published"
    return happened + Counter({f"fault: {name}": count for name, count in proxy.done.items()})


def _names(manifest) -> dict[str, str]:
    return {file.file: file.sha256 for file in manifest.files}


def _hashes(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def _kind(error: Exception, address: str, url: str) -> str:
    sentence = str(error)
    assert "\n" not in sentence and sentence.endswith("."), sentence
    return f"{type(error).__name__} {sentence.replace(address, 'ADDRESS').replace(url, 'SERVER').split(';')[0]}"[:110]


def main() -> None:
    """Run the schedules and write what was counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=200)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    survived, happened, failures = 0, Counter(), []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, running_s3_server(Path(folder) / "server") as server:
        os.environ.update(server.environment)
        for seed in range(args.first_seed, args.first_seed + args.schedules):
            try:
                happened += survive(server, Path(folder), seed=seed, share=(0.02, 0.1, 0.3)[seed % 3])
                survived += 1
            except Exception as error:  # noqa: BLE001 - whatever it is, the schedule was not survived
                failures.append(f"seed {seed}: {type(error).__name__}: {error}")
                print(failures[-1], flush=True)
            print(f"survived {survived}/{seed - args.first_seed + 1}", flush=True)
    result = {
        "survived": survived,
        "schedules": args.schedules,
        "publications_a_schedule": PUBLICATIONS,
        "share_of_requests_harmed": [0.02, 0.1, 0.3],
        "failures": failures,
        "happened": dict(sorted(happened.items())),
        "seconds": round(time.monotonic() - begun),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, loopback, SeaweedFS",
    }
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    raise SystemExit(0 if survived == args.schedules else 1)


if __name__ == "__main__":
    main()
