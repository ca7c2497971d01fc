"""What can be refused of a training before anything expensive begins."""

import argparse
from pathlib import Path

from . import settings
from .argument_checks import check_args
from .hub_release import prepare_push
from .remote_checkpoints import fetch_checkpoint
from .run_directory import check_run_directory, find_checkpoint
from .uploading import Uploads, open_uploads


def check_run(args: argparse.Namespace) -> tuple[dict[str, str], Path | None, Uploads]:
    """Everything that can be refused at once, before torch is even imported.

    Returns:
        What was chosen, the checkpoint to resume from, and what publishes the run.
    """
    sources = settings.choose_sources(args)
    check_args(args)
    resuming = args.resume_from_checkpoint is not None
    check_run_directory(args.output_dir, resuming=resuming, overwrite=args.overwrite_output_dir)
    if args.push_to_hub:
        tag = None if resuming else args.hub_tag  # a run that is resumed may have made it
        args.hub_model_id = prepare_push(
            args.hub_model_id, exp_name=args.exp_name, private=args.hub_private_repo, tag=tag
        )
    uploads = open_uploads(args.push_to_s3, args.output_dir, may_exist=resuming or args.overwrite_output_dir)
    if not resuming:
        return sources, None, uploads
    wanted = fetch_checkpoint(args.output_dir, args.resume_from_checkpoint, address=args.push_to_s3)
    return sources, find_checkpoint(args.output_dir, wanted), uploads
