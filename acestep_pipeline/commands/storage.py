"""`acestep-lora storage`: releases on S3 or a shared disk, by name, and on the Hub."""

import argparse
import atexit
import contextlib
import gc
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from ..data.text.text_files import one_line
from ..errors import RunError, UsageError
from ..storage.copies import NUM_WORKERS, is_remote
from ..storage.hub_address import is_on_hub
from ..storage.names import ROOT_VARIABLE, address_of, is_address
from ..storage.release_manifest import Manifest
from ..storage.s3 import shown
from . import hub_storage

_NAME_HELP = f"e.g. lora/my-adapter, below ${ROOT_VARIABLE}; or s3://bucket/…, or a folder's path (/…, ./…)"


def add_arguments(actions: argparse._SubParsersAction, add: Callable[..., argparse.ArgumentParser]) -> None:
    """Declare the actions; `add(actions, name, description, run)` makes the parser of one."""
    action = add(actions, "init", "make a bucket, or set one up, and print what its users must be allowed", _init)
    action.add_argument("address", nargs="?", help=f"s3://bucket or s3://bucket/prefix; unset: ${ROOT_VARIABLE}")
    action.add_argument("--dry-run", action="store_true", help="only say what would be set, and print the policies")

    action = add(actions, "ls", "list what is published, or the releases of one name", _ls)
    action.add_argument(
        "name", nargs="?", default="", help=f"{_NAME_HELP}; a part of it lists what is below it; or hf://…"
    )

    action = add(actions, "push", "publish a folder: all of it or nothing, and only what is not there yet", _push)
    action.add_argument("directory", type=Path, help="a run's output directory, a dataset, …")
    where = action.add_mutually_exclusive_group(required=True)
    where.add_argument("name", nargs="?", help=f"{_NAME_HELP}; or hf://[datasets/]user/name[@branch]")
    where.add_argument("--to", metavar="NAME", help="the same")
    action.add_argument("--version", "--tag", help="a tag for this release, e.g. v1.2")
    action.add_argument("--private", action="store_true", help="on the Hub: make the repository private")
    action.add_argument("--message", help="a remark, kept with the release")
    action.add_argument("--force", action="store_true", help="add a release to a name that has one; the old ones stay")
    action.add_argument("--include_checkpoints", action="store_true", help="checkpoint-<n>/ and optimizer state, too "
                        "(hidden files never)")  # fmt: skip
    _add_transfer_arguments(action)

    action = add(actions, "pull", "fetch a release into a new folder, checked by SHA-256; goes on after a cut", _pull)
    action.add_argument("name", help=f"{_NAME_HELP}; or hf://[datasets/]user/name[@revision]")
    action.add_argument("directory", type=Path, help="a new folder")
    action.add_argument("--version", help="a release's tag or number, on the Hub any revision (default: the latest)")
    action.add_argument("--force", action="store_true", help="replace a folder that an earlier pull brought")
    _add_transfer_arguments(action)

    action = add(actions, "sync", "make a folder, an s3:// prefix or a repository of the Hub hold the files of "
                 "another, under their plain names, as `aws s3 sync` does", _sync)  # fmt: skip
    action.add_argument("source", help="a folder's path, s3://bucket/prefix or hf://[datasets/]user/name[@revision]; "
                        "of a release, its files")  # fmt: skip
    action.add_argument("target", help="the same; it holds no releases; a new repository is private")
    action.add_argument("--delete", action="store_true", help="remove from the target what the source does not have")
    action.add_argument("--dry-run", action="store_true", help="only say what would be done")
    action.add_argument("--checksum", action="store_true", help="compare the content of files of equal size, whatever "
                        "their times say")  # fmt: skip
    _add_transfer_arguments(action)

    action = add(actions, "verify", "read the content of a release and compare its SHA-256", _verify)
    action.add_argument("name", help=_NAME_HELP)
    group = action.add_mutually_exclusive_group()
    group.add_argument("--version", help="a release's tag or number (default: the latest)")
    group.add_argument("--all", action="store_true", help="of every release")
    _add_transfer_arguments(action, only_reads=True)

    action = add(actions, "rollback", "make an earlier release the latest again, as a new release", _rollback)
    action.add_argument("name", help=_NAME_HELP)
    action.add_argument("version", help="the release's tag or number")

    action = add(actions, "gc", "remove content that no release names: of pushes that were cut", _gc)
    action.add_argument("name", help=f"{_NAME_HELP}; a part of it takes every name below it")
    action.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    action.add_argument("--older-than-h", type=float, default=24.0, metavar="H", help="leave alone what is younger: "
                        "it may be a push under way (default: 24 hours, at least 2)")  # fmt: skip

    action = add(actions, "cost", "count what lies on S3 and, with your region's prices, say what it costs", _cost)
    action.add_argument("name", nargs="?", default="", help=f"{_NAME_HELP}; a part of it takes all below it")
    action.add_argument(
        "--prices", type=Path, metavar="FILE", help="your region's prices, a file that --template begins"
    )
    action.add_argument("--template", action="store_true", help="print that file, to be filled in")


def _add_transfer_arguments(action: argparse.ArgumentParser, *, only_reads: bool = False) -> None:
    action.add_argument("--num_workers", type=_count, default=NUM_WORKERS, metavar="N", help="requests at a time "
                        f"(default: {NUM_WORKERS})")  # fmt: skip
    if not only_reads:
        action.add_argument("--max_bandwidth", type=_rate, metavar="RATE", help="of all requests together, e.g. "
                            "10MB/s (default: no limit)")  # fmt: skip


def _count(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of requests; give 1 or more")
    return int(text)


def _rate(text: str) -> float:
    """Bytes a second."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(k|M|G)B(?:/s)?", text, re.IGNORECASE)
    rate = float(match[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[match[2].lower()] if match else 0
    if rate < 1e4:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate; give at least 10kB/s, e.g. 500kB/s or 10MB/s")
    return rate


@contextlib.contextmanager
def _collecting_rarely() -> Iterator[None]:
    """Look for cycles among unused objects a hundred times more rarely, and not at the end of the process: nearly all
    objects of these commands live until then, and going through them is a third of the work of a small sync."""
    before = gc.get_threshold()
    gc.set_threshold(100 * before[0], *before[1:])
    atexit.register(gc.freeze)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _init(args: argparse.Namespace) -> int:
    from ..storage.bucket_setup import ROLES, access_policy, set_up_bucket

    address = args.address or address_of("", partly=True)
    if not is_remote(address):
        raise UsageError(f"{one_line(address)} is no bucket; write s3://bucket. A folder needs no set-up.")
    for sentence in set_up_bucket(address, dry_run=args.dry_run):
        print(sentence)
    for role, may in ROLES.items():
        print(f"\nIAM policy for a {role} ({may}):")
        print(json.dumps(access_policy(role, address), indent=2))
    return 0


@_collecting_rarely()
def _push(args: argparse.Namespace) -> int:
    from ..storage.publishing import publish

    args.name = args.to if args.name is None else args.name
    if is_on_hub(args.name):
        return hub_storage.push(args, args.name)
    if args.private:
        raise UsageError("--private is the Hub's; a bucket's policies say who may read it.")
    address = address_of(args.name)
    published = publish(
        args.directory,
        address,
        version=args.version,
        message=args.message,
        force=args.force,
        include_checkpoints=args.include_checkpoints,
        num_workers=args.num_workers,
        max_bytes_per_s=args.max_bandwidth,
    )
    manifest = published.manifest
    if published.left_out:
        checkpoints = [name for name in published.left_out if not re.search(r"(^|/)\.", name)]
        hint = "; --include_checkpoints takes those of checkpoints" if checkpoints else ""
        print(f"Left out {len(published.left_out)} files, e.g. {one_line(published.left_out[0])}{hint}")
    if published.is_new:
        print(f"Published {shown(address)}: {_describe(manifest)}; {_megabytes(published.sent_bytes)} were sent")
    else:
        print(f"{shown(address)} has these files already: {_describe(manifest)}; nothing was sent")
    print(f"Next: acestep-lora storage pull {shlex.quote(args.name)} my_copy")
    return 0


@_collecting_rarely()
def _pull(args: argparse.Namespace) -> int:
    from ..storage.release_pull import pull_release

    if is_on_hub(args.name):
        return hub_storage.pull(args, args.name)
    address = address_of(args.name)
    manifest, fetched = pull_release(
        address,
        args.directory,
        version=args.version,
        force=args.force,
        num_workers=args.num_workers,
        max_bytes_per_s=args.max_bandwidth,
    )
    print(f"{one_line(str(args.directory))} is {shown(address)}: {_describe(manifest)}; {_megabytes(fetched)} fetched")
    return 0


@_collecting_rarely()
def _sync(args: argparse.Namespace) -> int:
    from .. import storage

    report = storage.sync(
        args.source,
        args.target,
        delete=args.delete,
        dry_run=args.dry_run,
        compare_content=args.checksum,
        num_workers=args.num_workers,
        max_bytes_per_s=args.max_bandwidth,
    )
    if args.dry_run:
        for did, names in (("would send", report.sent), ("would remove", report.removed)):
            for name in names:
                print(f"{did} {one_line(name)}")
    sent, removed = ("would be sent", "to remove") if args.dry_run else ("sent", "removed")
    print(
        f"{one_line(shown(args.target))}: {len(report.sent)} files of {_megabytes(report.sent_bytes)} {sent}, "
        f"{report.num_unchanged} unchanged, {len(report.removed)} {removed}"
    )
    return 0


def _ls(args: argparse.Namespace) -> int:
    from ..storage.publishing import read_history
    from ..storage.store_care import find_published
    from ..storage.stores import open_store

    if is_on_hub(args.name):
        return hub_storage.ls(args.name)
    address = address_of(args.name, partly=True)
    found = list(find_published(address))
    if found and found[0][0] == "" and found[0][1] is not None:
        for manifest in read_history(open_store(address), found[0][1]):
            print(f"{_describe(manifest)}{f'  ({one_line(manifest.message)})' if manifest.message else ''}")
        for file in found[0][1].files:
            print(f"{file.size:>14,}  {file.sha256[:12]}  {one_line(file.file)}")
        return 0
    above = "" if address == args.name or not args.name else f"{args.name.strip('/')}/"
    for name, manifest in found:
        print(f"{above}{one_line(name) or '.'}  {_describe(manifest) if manifest else 'its manifest is damaged'}")
    if not found:
        print(f"nothing is published below {shown(address)}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from ..storage.store_care import verify

    address = address_of(args.name)
    releases, damage = verify(address, version=args.version, every_release=args.all, num_workers=args.num_workers)
    if damage:
        print("\n".join(damage))
        raise RunError(f"{shown(address)}: {len(damage)} files are not what was published.")
    for manifest in releases:
        print(f"Intact: {_describe(manifest)}")
    return 0


def _rollback(args: argparse.Namespace) -> int:
    from ..storage.publishing import rollback

    address = address_of(args.name)
    manifest = rollback(address, args.version)
    print(f"Published {shown(address)}: {_describe(manifest)} ({manifest.message})")
    return 0


def _gc(args: argparse.Namespace) -> int:
    from ..storage.store_care import collect_garbage, find_garbage_places

    address = address_of(args.name, partly=True)
    for place in find_garbage_places(address):
        garbage = collect_garbage(place, older_than_s=args.older_than_h * 3600, dry_run=args.dry_run)
        did = "would remove" if args.dry_run else "removed"
        print(
            f"{shown(place)}: {did} {len(garbage.content)} objects of {_megabytes(garbage.size)} and "
            f"{len(garbage.unfinished)} unfinished uploads; left {garbage.num_young} that are younger than "
            f"{args.older_than_h:g} h"
        )
    return 0


def _cost(args: argparse.Namespace) -> int:
    from ..storage.costs import TEMPLATE, count_holdings, read_prices, table

    if args.template:
        print(TEMPLATE, end="")
        return 0
    prices = read_prices(args.prices) if args.prices else None
    address = address_of(args.name, partly=True)
    if not is_remote(address):
        raise UsageError(f"{one_line(address)} is no bucket, and a folder has no prices; write s3://bucket/….")
    holdings = count_holdings(address, above="" if is_address(args.name) else args.name)
    if not holdings:
        print(f"nothing lies below {shown(address)}")
        return 0
    print("\n".join(table(holdings, prices)))
    print("PUTs: the requests of sending all of it once, LISTs too; GETs: of fetching it. 1 GB is 2^30 bytes.")
    if prices is None:
        print("With prices: acestep-lora storage cost --template > prices.yaml, fill it in, and --prices prices.yaml")
    elif prices.said:
        print(f"Prices: {prices.said}")
    return 0


def _describe(manifest: Manifest) -> str:
    number = "not published" if manifest.release is None else f"release {manifest.release}"
    version = f" {manifest.version}" if manifest.version else ""
    created = f", {manifest.created}" if manifest.created else ""
    return f"{number}{version}, {len(manifest.files)} files, {_megabytes(manifest.size)}{created}"


def _megabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
