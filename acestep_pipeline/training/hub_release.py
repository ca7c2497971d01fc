"""`--push_to_hub`: what can be refused before a run begins, and the publication at its end."""

import shlex
from pathlib import Path

from ..data.building.report_card import HUB_LICENSES
from ..data.text.text_files import one_line
from ..errors import RunError, UsageError
from ..storage.hub_address import SCHEME, HubAddress, is_on_hub, parse_hub_address
from .launch import is_first_process

# Of huggingface.co/docs/hub/repositories-licenses, for models.
_LICENSES = HUB_LICENSES | {"openrail", "creativeml-openrail-m", "openmdw-1.0", "other", "unknown"}


def check_hub_arguments(
    *, push_to_hub: bool, named: dict[str, object], license: str | None, resume_from_checkpoint: str | None
) -> None:
    """Refuse what doesn't go together, without asking anybody.

    Args:
        named: values of the flags that need --push_to_hub, by their names.

    Raises:
        UsageError: one of them is there alone, the licence is none that the Hub knows, or a checkpoint is looked for
            on the Hub, where none is ever published.
    """
    if resume_from_checkpoint is not None and is_on_hub(resume_from_checkpoint):
        raise UsageError(
            f"--resume_from_checkpoint {one_line(resume_from_checkpoint)}: checkpoints are not kept on the Hub; name "
            "a checkpoint folder, or use 'latest'."
        )
    alone = [name for name, value in named.items() if value]
    if alone and not push_to_hub:
        raise UsageError(f"--{alone[0]} does nothing without --push_to_hub; add it, or leave --{alone[0]} out.")
    if license is not None and license not in _LICENSES:
        raise UsageError(
            f"--license {one_line(license)!r} is no licence that the Hub knows; write one of "
            f"{', '.join(sorted(_LICENSES))}."
        )


def prepare_push(hub_model_id: str | None, *, exp_name: str, private: bool, tag: str | None) -> str:
    """The `user/name` to publish to, after trying whether that will be allowed; the first process of a run tries.

    Raises:
        UsageError: it won't be; or the Hub can't be reached.
        RunError: the Hub failed.
    """
    if not is_first_process():
        return hub_model_id or exp_name
    from ..storage.hub_push import check_may_push, complete_id

    try:
        address = _address(complete_id(hub_model_id, default=exp_name))
        check_may_push(address, private=private, tag=tag)
    except UsageError as error:
        raise UsageError(f"--push_to_hub: {error}") from error
    return address.repo_id


def push_run(output_dir: Path, *, hub_model_id: str, private: bool, tag: str | None) -> str:
    """Publish a finished run; returns what to tell the user.

    Raises:
        RunError: it can't be published; it says what was kept, and how to publish it later.
    """
    from ..storage.hub_push import push_to_hub

    address = _address(hub_model_id)
    try:
        release = push_to_hub(output_dir, address, private=private, tag=tag)
    except (UsageError, RunError) as error:
        flags = f"{' --private' if private else ''}{f' --tag {shlex.quote(tag)}' if tag else ''}"
        raise RunError(
            f"not published ({str(error).rstrip('.')}); the adapter is kept in {output_dir}, publish it with "
            f"acestep-lora storage push {shlex.quote(str(output_dir))} --to {address}{flags}."
        ) from error
    state = "published" if release.is_new else "published already, nothing was sent"
    return f"  {state:<14} {release.url} (commit {release.commit[:12]}{f', tag {tag}' if tag else ''})"


def _address(hub_model_id: str) -> HubAddress:
    """Raises `UsageError` for a name that can't be one."""
    name = hub_model_id.removeprefix(SCHEME)
    if name.count("/") != 1 or "@" in name:
        raise UsageError(f"--hub_model_id {one_line(hub_model_id)!r} is no name on the Hub; write user/name.")
    return parse_hub_address(SCHEME + name, kind="model")
