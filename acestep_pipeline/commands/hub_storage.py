"""`acestep-lora storage` of `hf://` addresses: what push, pull and ls do there."""

import argparse
import shlex

from ..data.text.text_files import one_line
from ..errors import UsageError
from ..storage.hub_address import parse_hub_address


def push(args: argparse.Namespace, address: str) -> int:
    """Publish `args.directory`."""
    from ..storage.hub_push import push_to_hub

    if args.include_checkpoints:
        raise UsageError("--include_checkpoints: checkpoints and optimizer state are not published on the Hub.")
    wanted = parse_hub_address(address)
    release = push_to_hub(
        args.directory,
        wanted,
        private=args.private,
        tag=args.version,
        message=args.message,
        num_workers=args.num_workers,
        max_bytes_per_s=args.max_bandwidth,
    )
    if release.left_out:
        print(f"Left out {len(release.left_out)} files, e.g. {one_line(release.left_out[0])}")
    commit = f"commit {release.commit[:12]}{f', tag {args.version}' if args.version else ''}"
    if release.is_new:
        sent = f"{release.num_files} files of {release.size_bytes / 1e6:.1f} MB are new or changed"
        print(f"Published {wanted}: {commit}; {sent}\n{release.url}")
    else:
        print(f"{wanted} has these files already: {commit}; nothing was sent")
    print(f"Next: acestep-lora storage pull {shlex.quote(str(wanted))} my_copy")
    return 0


def pull(args: argparse.Namespace, address: str) -> int:
    """Fetch a repository into `args.directory`."""
    from ..storage.hub_pull import pull_from_hub
    from ..storage.on_hub import at_version

    wanted = at_version(parse_hub_address(address), args.version)
    listing, size = pull_from_hub(
        wanted,
        args.directory,
        force=args.force,
        num_workers=args.num_workers,
        max_bytes_per_s=args.max_bandwidth,
    )
    print(
        f"{one_line(str(args.directory))} is {wanted}: commit {listing.commit[:12]}, {len(listing.files)} files, "
        f"{size / 1e6:.1f} MB, each with its hash"
    )
    return 0


def ls(address: str) -> int:
    """Print a repository's commit, tags and files."""
    from ..storage.hub_pull import list_repository

    wanted = parse_hub_address(address)
    listing = list_repository(wanted)
    size = sum(file.size for file in listing.files)
    print(f"{wanted}: commit {listing.commit[:12]}, {len(listing.files)} files, {size / 1e6:.1f} MB")
    for tag, commit in listing.tags.items():
        print(f"tag {one_line(tag)}: commit {commit[:12]}")
    for file in listing.files:
        print(f"{file.size:>14,}  {(file.lfs.sha256 if file.lfs else file.blob_id)[:12]}  {one_line(file.path)}")
    return 0
