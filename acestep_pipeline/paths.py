"""Where things are: caches, the default model and data, and whether a directory can be written.

The `check_…` functions are the doctor's: they return a status ("ok", "warning" or "error"), one sentence and, unless
all is well, the fix.
"""

import errno
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from .data.text.text_files import one_line
from .errors import UsageError

HUB_CHECKPOINT = "ACE-Step/acestep-v15-base"
XL_HUB_CHECKPOINT = "ACE-Step/acestep-v15-xl-base-diffusers"
# diffusers' own name for an adapter's file.
LORA_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
# PEFT's names, and the folders of an adapter directory that hold its other formats.
PEFT_WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_CONFIG_NAME = "adapter_config.json"
PEFT_DIR, COMFYUI_DIR = "peft", "comfyui"
# A password before the bucket, or what signs a link.
_SECRET_IN_ADDRESS = re.compile(r"^[^/]*:[^/]*@|[?&](X-Amz-|AWSAccessKeyId=|Signature=)", re.IGNORECASE)
COMFYUI_ENDING = "_comfyui.safetensors"
DATA_FOLDERS = ("/data", "./data")
_NO_DATA_FOLDERS = " and no ".join(DATA_FOLDERS)
GIB = 1024**3


def cache_dir() -> Path:
    """The project's cache directory: `ACESTEP_CACHE_DIR`, else `~/.cache/acestep-lora`. It may not exist yet."""
    return Path(os.environ.get("ACESTEP_CACHE_DIR") or "~/.cache/acestep-lora").expanduser()


def default_model(chosen: str | None = None, *, preset: str | None = None) -> tuple[str, str]:
    """The checkpoint to use and where that was said: the flag, `ACESTEP_MODEL`, `/model`, else the Hub's base: the 2 B
    model, or with a preset for XL that one."""
    if chosen:
        return chosen, "--pretrained_model_name_or_path"
    if os.environ.get("ACESTEP_MODEL"):
        check_addresses(os.environ["ACESTEP_MODEL"])
        return os.environ["ACESTEP_MODEL"], "ACESTEP_MODEL"
    if holds_something(Path("/model")):  # a container has that folder in any case
        return "/model", "the default folder"
    if (preset or "").startswith("xl_"):
        return XL_HUB_CHECKPOINT, "the published XL base checkpoint"
    return HUB_CHECKPOINT, "the published base checkpoint"


def holds_something(folder: Path) -> bool:
    """Whether `folder` is a folder and not empty."""
    return folder.is_dir() and any(folder.iterdir())


def default_data(chosen: str | None = None) -> tuple[str, str]:
    """The training data and where that was said: the flag, `ACESTEP_DATA`, `/data`, else `./data`.

    Raises:
        UsageError: nothing was named and neither default folder exists.
    """
    if chosen:
        return chosen, "--train_data_dir"
    if os.environ.get("ACESTEP_DATA"):
        check_addresses(os.environ["ACESTEP_DATA"])
        return os.environ["ACESTEP_DATA"], "ACESTEP_DATA"
    for folder in DATA_FOLDERS:
        if Path(folder).is_dir():
            return folder, "the default folder"
    raise UsageError(
        f"no training data: --train_data_dir and ACESTEP_DATA are not set, and there is no {_NO_DATA_FOLDERS}; "
        "name a folder of audio with --train_data_dir."
    )


def free_space_bytes(directory: Path) -> int:
    """Free bytes, for this user, on the file system that holds `directory` or would hold it once created."""
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def check_room(directory: Path, size_bytes: int) -> None:
    """Refuse to bring more into a folder than its file system has room for.

    Raises:
        UsageError: it has less.
    """
    free = free_space_bytes(directory)
    if size_bytes > free:
        raise UsageError(
            f"{one_line(str(directory))} has {free / 1e9:.1f} GB free and {size_bytes / 1e9:.1f} GB are to come; make "
            "room."
        )


def probe_writable(directory: Path) -> None:
    """Create `directory` if need be, write a file in it, and remove whatever this call created.

    Raises `OSError` when any of it can't be done: not a directory, no permission, read-only, no space left.
    """
    created: list[Path] = []
    try:
        for ancestor in [*reversed(directory.absolute().parents), directory.absolute()]:
            if not ancestor.is_dir():
                try:
                    ancestor.mkdir()
                except FileExistsError:
                    raise NotADirectoryError(errno.ENOTDIR, f"{ancestor} is not a directory") from None
                created.append(ancestor)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())  # a full disk may only show now
    finally:
        for ancestor in reversed(created):
            try:
                ancestor.rmdir()
            except OSError:
                break  # somebody else put something there meanwhile: it is theirs now


def check_directory(directory: Path, wanted_gib: int, fix: str, unwritable: str = "warning") -> tuple[str, ...]:
    try:
        probe_writable(directory)
    except OSError as error:
        return unwritable, f"{directory} can't be written ({error.strerror})", f"{fix}, or mend this one"
    free = free_space_bytes(directory) / GIB
    if free < wanted_gib:
        return "warning", f"{directory}: {free:.1f} GiB free, less than {wanted_gib} GiB", f"make room there, or {fix}"
    return "ok", f"{directory}: {free:.1f} GiB free, writable"


def check_shared_memory() -> tuple[str, ...]:
    shm = Path("/dev/shm")
    if sys.platform != "linux":
        return "ok", f"{sys.platform} doesn't use /dev/shm"
    free = free_space_bytes(shm) if shm.is_dir() else 0
    if free < 64 * 1024**2:
        fix = "start the container with `--shm-size 1g`, or train on one GPU"
        return "warning", f"/dev/shm has {free / 1024**2:.0f} MiB free: NCCL needs more between GPUs", fix
    return "ok", f"/dev/shm: {free / GIB:.1f} GiB free, for NCCL between GPUs"


def check_model(model: str | None) -> tuple[str, ...]:
    from huggingface_hub import constants

    chosen, source = default_model(model)
    shown = f"{without_secrets(chosen)} ({source})"
    if chosen == "tiny":
        return "ok", f"{shown}: built from a seed, without a download"
    if "://" in chosen:
        return "ok", f"{shown}: not looked at"
    if Path(chosen).expanduser().exists():
        return "ok", f"{shown} exists"
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", chosen):
        return "error", f"{shown} doesn't exist", "correct the path, or name a Hub id (owner/name) or `tiny`"
    if Path(constants.HF_HUB_CACHE, f"models--{chosen.replace('/', '--')}").is_dir():
        return "ok", f"{shown} is in the Hugging Face cache"
    if constants.HF_HUB_OFFLINE:
        fix = "download it while online (`hf download`), or train `tiny` or a local folder"
        return "warning", f"{shown} isn't cached, and HF_HUB_OFFLINE is set", fix
    return "ok", f"{shown} comes from the Hub at first use"


def check_data(data: str | None) -> tuple[str, ...]:
    fix = "give --train_data_dir a folder of audio files or a prepared dataset, or --dataset_name a Hub id"
    try:
        chosen, source = default_data(data)
    except UsageError:
        return "warning", f"there is no {_NO_DATA_FOLDERS}, and ACESTEP_DATA is not set", fix
    shown = f"{without_secrets(chosen)} ({source})"
    if "://" in chosen:
        return "ok", f"{shown}: not looked at"
    if Path(chosen).expanduser().exists():
        return "ok", f"{shown} exists"
    return "error", f"{shown} doesn't exist", fix


def without_secrets(address: str) -> str:
    """`address` without user name, password, query and fragment; hidden whole where those can't be told apart."""
    host_and_path = r"(?:\[[\da-fA-F:.]+\]|[^@?#:/]*)(?::\d+)?(?:/[^@?#]*)?"
    parts = re.fullmatch(rf"(\w+://)?([^@/?#]*@)?({host_and_path})([?#][^@]*)?", address)
    return (parts[1] or "") + parts[3] if parts else "(hidden: it may contain a password)"


def check_addresses(*values: object) -> None:
    """Refuse addresses that nothing here reads, or that hold a password or a signature, before anything repeats them.

    Args:
        values: of flags; text, paths, and lists of these can be addresses.

    Raises:
        UsageError: one is such an address; what is secret in it is left out.
    """
    for value in values:
        if isinstance(value, list):
            check_addresses(*value)
        if not isinstance(value, str | Path):
            continue
        slashes = "/" if isinstance(value, Path) else "//"  # a path has lost one
        match = re.fullmatch(rf"([A-Za-z][A-Za-z0-9+.-]+):{slashes}(\S.*)", str(value), re.DOTALL)
        if match is None:
            continue
        shown = one_line(without_secrets(f"{match[1]}://{match[2]}"))
        if match[1] not in ("s3", "hf"):
            raise UsageError(
                f"{shown}: {match[1]}:// can't be read or written; give a folder, s3://bucket/prefix or "
                "hf://user/repo, or download it first."
            )
        if _SECRET_IN_ADDRESS.search(match[2]):
            raise UsageError(
                f"{shown} is not an address; write s3://bucket/folder or hf://user/repo, without keys or passwords."
            )
        if isinstance(value, Path):
            raise UsageError(
                f"{shown}: only a folder or file of this machine will do there; name one, "
                "and copy it with `acestep-lora storage`."
            )
