"""Where a checkpoint lies and which files its parts need: either layout, in a folder, on S3 or on the Hub."""

import fnmatch
import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .checkpoint_conversion import (
    SILENCE_LATENT_NAME,
    TEXT_ENCODER_DIR,
    VAE_DIR,
    WEIGHTS_INDEX_NAME,
    OriginalCheckpoint,
    locate_original,
)
from .errors import UsageError
from .paths import check_addresses
from .storage.copies import describe_objects, local_copy
from .storage.hub import cached_blob_ids, download, looks_like_path
from .storage.hub_address import is_on_hub, parse_hub_address
from .tiny_checkpoint import TINY_NAME, tiny_checkpoint_path

# The repository that holds the VAE and the text encoder which every 2 B variant shares.
SHARED_COMPONENTS_REPO = "ACE-Step/Ace-Step1.5"

MODEL_INDEX_NAME = "model_index.json"
COMPONENTS = ("vae", "text_encoder", "tokenizer", "transformer", "condition_encoder", "scheduler")
# In diffusers' layout: what a warm latent cache stands for.
ENCODERS = ("vae", "text_encoder", "tokenizer", "condition_encoder")
# The original layout: the files of a DiT's folder, which hold the condition encoder too.
DIT_PATTERNS = ("config.json", "model*.safetensors", WEIGHTS_INDEX_NAME, SILENCE_LATENT_NAME)


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint that was found, of which nothing but small files is on this machine yet, unless it lies here.

    Attributes:
        is_original: whether it is in the original layout.
        is_remote: whether it has to be fetched.
        encoders_id: SHA-256 that changes with the files of the VAE, the text encoder, its tokenizer and the condition
            encoder; None where it can't be known without reading them.
        fetch: brings it here and says where it is; without `encoders`, the files of the DiT (in the original layout
            the condition encoder is among them) and the configurations are enough.
    """

    is_original: bool
    is_remote: bool
    encoders_id: str | None
    fetch: Callable[..., Path | OriginalCheckpoint]


def resolve_checkpoint(
    name: str, *, variant_dir: str | None = None, revision: str | None = None, cache_dir: str | None = None
) -> Path | OriginalCheckpoint:
    """Turn what the user named into files on disk, downloading what is on S3 or the Hub, and no more than is needed.

    Returns:
        A folder in diffusers layout, or the parts of an original-layout checkpoint.

    Raises:
        UsageError: it is neither, or can't be reached.
    """
    return open_checkpoint(name, variant_dir=variant_dir, revision=revision, cache_dir=cache_dir).fetch()


def open_checkpoint(
    pretrained_model_name_or_path: str,
    *,
    variant_dir: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
) -> CheckpointSource:
    """Find out what a checkpoint is, and what its encoders are, without its weights.

    Args:
        pretrained_model_name_or_path: `"tiny"`, a folder, an `s3://` address or a Hub id.
        variant_dir: which DiT of the original layout.
        revision, cache_dir: the Hub's.

    Raises:
        UsageError: it is no checkpoint, or can't be reached.
    """
    name = str(pretrained_model_name_or_path)
    if name == TINY_NAME:
        return _open_folder(tiny_checkpoint_path(), None)
    if name.startswith("s3://"):
        return _open_s3(name, variant_dir)
    if is_on_hub(name):
        address = parse_hub_address(name, kind="model")
        if address.folder:
            raise UsageError(f"{name} names a folder; write {address.repository}, and which DiT with --variant_dir.")
        return _open_hub(
            address.repo_id, variant_dir=variant_dir, revision=address.revision or revision, cache_dir=cache_dir
        )
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _open_folder(folder, variant_dir)
    if folder.exists() or looks_like_path(name):
        raise UsageError(f"the checkpoint {name!r} is not a folder, not a Hub id (user/name), and not 'tiny'.")
    return _open_hub(name, variant_dir=variant_dir, revision=revision, cache_dir=cache_dir)


# --- a folder --------------------------------------------------------------------------------------------------------


def _open_folder(folder: Path, variant_dir: str | None) -> CheckpointSource:
    found = _locate(folder, variant_dir)
    if isinstance(found, OriginalCheckpoint):
        folders = {found.dit: DIT_PATTERNS, found.vae: ("*",), found.text_encoder: ("*",)}
    else:
        folders = {found / component: ("*.json", "*.safetensors", "*.txt") for component in ENCODERS}
    files = {path: path.stat() for part, globs in folders.items() for glob in globs for path in part.glob(glob)}
    return CheckpointSource(
        is_original=isinstance(found, OriginalCheckpoint),
        is_remote=False,
        encoders_id=_digest({str(path.resolve()): [file.st_size, file.st_mtime_ns] for path, file in files.items()}),
        fetch=lambda encoders=True: found,
    )


def _locate(folder: Path, variant_dir: str | None, *, components: Iterable[str] = COMPONENTS):
    if not (folder / MODEL_INDEX_NAME).is_file():
        return locate_original(folder, variant_dir)
    missing = [component for component in components if not (folder / component).is_dir()]
    if missing:
        raise UsageError(f"the checkpoint {folder} misses {', '.join(missing)}; download or copy it again, complete.")
    return folder


# --- S3 --------------------------------------------------------------------------------------------------------------


def _open_s3(address: str, variant_dir: str | None) -> CheckpointSource:
    check_addresses(address)
    described = describe_objects(address)
    is_original = MODEL_INDEX_NAME not in described
    dit = _only_dit(address, described, variant_dir) if is_original else None

    def fetch(*, encoders: bool = True) -> Path | OriginalCheckpoint:
        patterns = _patterns(dit, encoders=encoders)
        folder = local_copy(address, choose=lambda names: _matching(names, patterns))
        return _locate(folder, dit, components=COMPONENTS if encoders else ("transformer",))

    encoders_id = _digest({name: described[name] for name in _encoder_files(described, dit)})
    return CheckpointSource(is_original=is_original, is_remote=True, encoders_id=encoders_id, fetch=fetch)


def _only_dit(address: str, names: Iterable[str], variant_dir: str | None) -> str:
    dits = sorted(name.removesuffix(f"/{SILENCE_LATENT_NAME}") for name in names if f"/{SILENCE_LATENT_NAME}" in name)
    if variant_dir in dits or (variant_dir is None and len(dits) == 1):
        return variant_dir or dits[0]
    missing = f"no ACE-Step 1.5 DiT in {variant_dir!r}" if variant_dir else "no single ACE-Step 1.5 DiT"
    raise UsageError(f"{address} holds {missing} (found: {', '.join(dits) or 'none'}); choose one with --variant_dir.")


# --- the Hub ---------------------------------------------------------------------------------------------------------


def _open_hub(name: str, *, variant_dir: str | None, revision: str | None, cache_dir: str | None) -> CheckpointSource:
    """Find out what a repository holds from a few small files; what is fetched later is of the commits found now."""
    fetch = functools.partial(download, cache_dir=cache_dir)

    def blob_ids(repo: str, snapshot: Path) -> dict[str, str]:
        return cached_blob_ids(repo, snapshot.name, cache_dir=cache_dir)

    small = [MODEL_INDEX_NAME, f"{VAE_DIR}/config.json", f"*{SILENCE_LATENT_NAME}"]
    probe = fetch(name, small, revision=revision, partly=True)
    if (probe / MODEL_INDEX_NAME).is_file():
        ids = blob_ids(name, probe)

        def fetch_diffusers(*, encoders: bool = True) -> Path:
            folder = fetch(name, _patterns(None, encoders=encoders), revision=probe.name)
            return _locate(folder, None, components=COMPONENTS if encoders else ("transformer",))

        encoders_id = _digest({file: ids[file] for file in _encoder_files(ids, None)})
        return CheckpointSource(is_original=False, is_remote=True, encoders_id=encoders_id, fetch=fetch_diffusers)
    # "." is a DiT at the top of the repository.
    dits = sorted(path.parent.relative_to(probe).as_posix() for path in probe.rglob(SILENCE_LATENT_NAME))
    held = ", ".join(dits) or "none"
    if variant_dir is None and len(dits) != 1:
        raise UsageError(f"{name} on the Hub holds no single ACE-Step 1.5 DiT (found: {held}); give --variant_dir.")
    folder = variant_dir or dits[0]
    # The base and sft DiTs have repositories of their own, named like the variant, by the same owner.
    own_repo = None if folder in dits else f"{name.split('/')[0]}/{folder}"
    try:
        dit_probe = fetch(own_repo, ["config.json"], revision=None, partly=True) if own_repo else probe
    except UsageError as error:
        raise UsageError(f"{name} holds no {variant_dir!r} (found: {held}), and {error}") from error
    dit_repo, folder = (own_repo, ".") if own_repo else (name, folder)
    shared_repo, shared_probe = name, probe
    if not (probe / VAE_DIR / "config.json").is_file():
        shared_repo = SHARED_COMPONENTS_REPO
        shared_probe = fetch(shared_repo, [f"{VAE_DIR}/config.json"], revision=None, partly=True)
    dit_patterns = [(Path(folder) / pattern).as_posix() for pattern in DIT_PATTERNS]
    shared_patterns = [f"{VAE_DIR}/*", f"{TEXT_ENCODER_DIR}/*"]

    def fetch_original(*, encoders: bool = True) -> OriginalCheckpoint:
        dit = fetch(dit_repo, dit_patterns, revision=dit_probe.name) / folder
        shared = fetch(shared_repo, shared_patterns, revision=shared_probe.name) if encoders else shared_probe
        return OriginalCheckpoint(dit=dit, vae=shared / VAE_DIR, text_encoder=shared / TEXT_ENCODER_DIR)

    dit_ids, shared_ids = blob_ids(dit_repo, dit_probe), blob_ids(shared_repo, shared_probe)
    own, others = _matching(dit_ids, dit_patterns), _matching(shared_ids, shared_patterns)
    ids = {f"{dit_repo}/{file}": dit_ids[file] for file in own} | {file: shared_ids[file] for file in others}
    encoders_id = _digest(ids) if own and others else None
    return CheckpointSource(is_original=True, is_remote=True, encoders_id=encoders_id, fetch=fetch_original)


# --- files by name ---------------------------------------------------------------------------------------------------


def _patterns(dit: str | None, *, encoders: bool) -> list[str]:
    """Of the files of a checkpoint: in diffusers' layout, or in the original one with this DiT's folder."""
    if dit is None:
        parts = ["*/*.json", "*/*.safetensors", "*/*.txt"] if encoders else ["*/config.json", "transformer/*"]
        return [MODEL_INDEX_NAME, *parts]
    files = "*" if encoders else "config.json"
    return [*(f"{dit}/{pattern}" for pattern in DIT_PATTERNS), f"{VAE_DIR}/{files}", f"{TEXT_ENCODER_DIR}/{files}"]


def _matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _encoder_files(names: Iterable[str], dit: str | None) -> list[str]:
    wanted = _matching(names, _patterns(dit, encoders=True))
    return wanted if dit is not None else [name for name in wanted if name.partition("/")[0] in ENCODERS]


def _digest(described: dict[str, object]) -> str | None:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest() if described else None
