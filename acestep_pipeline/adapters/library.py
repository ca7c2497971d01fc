"""A library of adapters for a service: fetched when asked for, checked, and kept in a pipeline while there is room.

library = AdapterLibrary("s3://bucket/lora", pipeline=pipeline, max_resident=8)
with library.use({"jazz": 0.8}):
    audio = pipeline("slow blues").audios
"""

import contextlib
import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from filelock import FileLock

from ..errors import UsageError
from ..files import sha256, write_text
from ..paths import cache_dir
from ..pipeline import ACEStepPipeline
from ..storage.release_manifest import MANIFEST_NAME
from .formats.locate import locate
from .shelves import list_adapters, read_manifest
from .weights import ActiveAdapters, Weight, loaded_adapters


class AdapterLibrary:
    """Adapters under one root, by name. All methods may be called from any thread: those that change the pipeline wait
    for one another, and `use` keeps the pipeline to itself until its block ends."""

    def __init__(
        self,
        root: str | os.PathLike | Sequence[str],
        *,
        pipeline: ACEStepPipeline | None = None,
        max_resident: int = 8,
    ) -> None:
        """List the adapters.

        Args:
            root: see `shelves.list_adapters`.
            pipeline: where adapters are loaded; without one they can be listed and fetched.
            max_resident: how many of them the pipeline holds at the same time; the one that was not used for longest
                makes room for the next.

        Raises:
            UsageError: the root can't be read, or `max_resident` is not positive.
        """
        if isinstance(max_resident, bool) or not isinstance(max_resident, int) or max_resident < 1:
            raise UsageError(f"max_resident must be a positive number of adapters, not {max_resident!r}.")
        self.root, self.max_resident = root, max_resident
        self._pipeline = pipeline
        self._addresses = list_adapters(root)
        self._resident: OrderedDict[str, str] = OrderedDict()  # name -> its name in the pipeline; latest used last
        self._in_use: list[str] = []
        self._lock = threading.RLock()

    def names(self) -> list[str]:
        """The adapters there are now, sorted."""
        self._addresses = list_adapters(self.root)
        return list(self._addresses)

    @property
    def resident(self) -> list[str]:
        """The adapters that the pipeline holds, the latest used last."""
        with self._lock:
            return list(self._resident)

    def fetch(self, name: str) -> Path:
        """An adapter's file on this machine: downloaded if need be, and checked.

        Its SHA-256 must be what the `manifest.json` beside it says; where there is none, what it was when this machine
        first saw it.

        Raises:
            UsageError: there is no such adapter, it can't be fetched, or it is another file than it should be.
        """
        address = self._address(name)
        path = locate(address)
        folder, published = read_manifest(address)
        relative = path.relative_to(folder).as_posix()
        digest = sha256(path)
        if relative in published:
            if published[relative] != digest:
                raise UsageError(
                    f"the adapter {name!r} is not the published one: the SHA-256 of {relative} is {digest[:12]}…, its "
                    f"{MANIFEST_NAME} says {published[relative][:12]}…; publish or copy it again."
                )
            return path
        key = f"{address}#{relative}"
        with _known_hashes() as known:
            if known.setdefault(key, digest) != digest:
                raise UsageError(
                    f"the adapter {name!r} has changed since it was first used (SHA-256 {known[key][:12]}… then, "
                    f"{digest[:12]}… now); if that is meant to be, call accept({name!r})."
                )
        return path

    def accept(self, name: str) -> None:
        """Forget what the files of an adapter were, so that what they are now is taken, from the next loading on."""
        address = self._address(name)
        with _known_hashes() as known:
            for key in [key for key in known if key.startswith(f"{address}#")]:
                del known[key]
        with self._lock:
            if name in self._resident and name not in self._in_use:
                self._evict(name)

    @contextlib.contextmanager
    def use(self, weights: Mapping[str, Weight]) -> Iterator[None]:
        """While the block lasts, these adapters act at these weights, and the pipeline is this thread's.

        Afterwards those of before act again.

        Args:
            weights: by name, as for `set_adapters`.

        Raises:
            UsageError: as `fetch` and `set_adapters`, or more adapters at once than `max_resident`.
        """
        with self.loaded(*weights) as names:
            self._pipeline.set_adapters([names[name] for name in weights], list(weights.values()))
            yield

    @contextlib.contextmanager
    def loaded(self, *names: str) -> Iterator[dict[str, str]]:
        """While the block lasts, the pipeline is this thread's and holds these adapters; yields their names in it.

        For a batch with an adapter for each prompt: `pipeline(prompts, adapters=[held["jazz"], None])`.

        Raises:
            UsageError: as `use`.
        """
        if self._pipeline is None:
            raise UsageError("this library was made without a pipeline; give it one to use adapters.")
        # Downloads go on while another thread generates.
        paths = {name: self.fetch(name) for name in names if name not in self.resident}
        with self._lock:
            there = loaded_adapters(self._pipeline.transformer)
            for name in [name for name, own_name in self._resident.items() if own_name not in there]:
                del self._resident[name]  # somebody unloaded it
            before = ActiveAdapters(self._pipeline.transformer)
            in_use = len(self._in_use)
            self._in_use += names
            try:
                if (count := len(set(self._in_use))) > self.max_resident:
                    raise UsageError(f"{count} adapters at once, and max_resident={self.max_resident}.")
                for name in names:
                    if name not in self._resident:
                        self._load(name, paths.get(name) or self.fetch(name))
                    self._resident.move_to_end(name)
                yield {name: self._resident[name] for name in names}
            finally:
                before.restore()
                del self._in_use[in_use:]

    def _load(self, name: str, path: Path) -> None:
        while len(self._resident) >= self.max_resident:
            self._evict(next(other for other in self._resident if other not in self._in_use))
        own_name = _free_name(name, loaded_adapters(self._pipeline.transformer))
        self._pipeline.load_lora_weights(path, adapter_name=own_name)
        self._resident[name] = own_name

    def _evict(self, name: str) -> None:
        self._pipeline.delete_adapters(self._resident.pop(name))

    def _address(self, name: str) -> str:
        if name not in self._addresses and name not in self.names():
            raise UsageError(f"the library {self.root} has no adapter {name!r}; it has: {', '.join(self._addresses)}.")
        return self._addresses[name]


def _free_name(name: str, taken: Sequence[str]) -> str:
    """A name that PyTorch takes for a module (no dots, none of `ModuleDict`'s own attributes) and no adapter has."""
    plain = re.sub(r"[^\w-]", "_", name)
    candidates = (f"{plain}{suffix}" for suffix in ("", *(f"_{number}" for number in range(2, len(taken) + 4))))
    return next(name for name in candidates if name not in taken and not hasattr(torch.nn.ModuleDict(), name))


@contextlib.contextmanager
def _known_hashes() -> Iterator[dict[str, str]]:
    """The SHA-256 of each adapter that was seen without a manifest; changes are kept, for later processes."""
    path = cache_dir() / "adapter-hashes.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        try:
            known = json.loads(path.read_text("utf-8")) if path.exists() else {}
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} can't be read ({type(error).__name__}); remove it to start anew.") from error
        before = dict(known)
        yield known
        if known != before:
            write_text(path, json.dumps(known, indent=1))
