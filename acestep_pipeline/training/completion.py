"""The end of a training: what is still being sent, the note that it is finished, and its release on the Hub."""

import argparse

from ..errors import RunError
from .hub_release import push_run
from .launch import is_first_process
from .run_directory import mark_finished
from .uploading import Uploads


def finish(args: argparse.Namespace, command: dict, uploads: Uploads) -> None:
    """Wait for what is being sent, note that the run is finished, and publish it.

    Raises:
        RunError: not all of it could be sent; the same command with `--resume_from_checkpoint latest` sends it.
    """
    uploads.add_adapter()
    not_sent = uploads.finish(args.upload_timeout_s)
    if not_sent:
        print(f"warning: {not_sent}")
    else:
        mark_finished(args.output_dir, command)
    publish(args)
    if not_sent:
        raise RunError(not_sent)


def publish(args: argparse.Namespace) -> None:
    """What the flags say is to be published of a finished run; nothing is sent twice."""
    if args.push_to_hub and is_first_process():
        how = {"private": args.hub_private_repo, "tag": args.hub_tag}
        print(push_run(args.output_dir, hub_model_id=args.hub_model_id, **how))
