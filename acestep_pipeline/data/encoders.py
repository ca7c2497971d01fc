"""The frozen encoders, and the little that the latent cache and the training loop need of them.

What is cached already needs no encoder. So that none has to be loaded to know which ones would encode, the cache keeps
that beside the tensors, for each checkpoint.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file

from .cache_files import cache_folder, read_header, write_cache_file

# Another version may make something else of the same files.
_LIBRARIES = ("diffusers", "tokenizers", "transformers")
_TENSORS = ("silence_latent", "null_condition_emb")


@dataclass(frozen=True)
class EncoderFacts:
    """What there is to know of a VAE, a text encoder, its tokenizer and a condition encoder.

    `vae_key` and `text_key` name them in the cache; `sample_rate` is in Hz. `silence_latent` `[1, frames, channels]`
    and `null_condition_emb` `[1, 1, dim]` are the condition encoder's, on the CPU and in its precision.
    """

    vae_key: str
    text_key: str
    sample_rate: int
    latents_per_second: float
    silence_latent: torch.Tensor
    null_condition_emb: torch.Tensor

    @classmethod
    def of(cls, pipeline) -> "EncoderFacts":
        """Look at the encoders of a pipeline, which takes reading all their weights."""
        tokenizer = json.loads(pipeline.tokenizer.backend_tokenizer.to_str())
        # Set by each call, so they say what the pipeline did last and not what it is.
        tokenizer |= {"truncation": None, "padding": None}
        text_key = fingerprint(pipeline.text_encoder, pipeline.condition_encoder)
        tensors = {name: getattr(pipeline.condition_encoder, name).detach().cpu().clone() for name in _TENSORS}
        return cls(
            vae_key=fingerprint(pipeline.vae)[:16],
            text_key=hashlib.sha256((text_key + json.dumps(tokenizer, sort_keys=True)).encode()).hexdigest()[:16],
            sample_rate=pipeline.sample_rate,
            latents_per_second=pipeline.latents_per_second,
            **tensors,
        )

    @classmethod
    def read(cls, path: Path) -> "EncoderFacts | None":
        """What `write` wrote; None where nothing is, or it is damaged."""
        header = read_header(path)
        return None if header is None else cls(**json.loads(header["metadata"]["facts"]), **load_file(path))

    def write(self, path: Path) -> None:
        """Keep them in a file; raises `RunError` where it can't be written."""
        facts = asdict(self)
        tensors = {name: facts.pop(name) for name in _TENSORS}
        write_cache_file(path, tensors, {"facts": json.dumps(facts)})


class Encoders:
    """The encoders of a checkpoint: `facts` at once, and the `pipeline` that encodes once something asks for it."""

    def __init__(self, facts: EncoderFacts, load: Callable[[], object]) -> None:
        """Take the facts, and what loads the pipeline."""
        self.facts, self._load = facts, load

    @classmethod
    def of(cls, pipeline) -> "Encoders":
        """Those of a pipeline that is there."""
        encoders = cls(EncoderFacts.of(pipeline), lambda: pipeline)
        encoders.pipeline = pipeline
        return encoders

    @classmethod
    def of_checkpoint(
        cls, encoders_id: str | None, *, latent_cache_dir: Path, dtype: torch.dtype, load: Callable[[], object]
    ) -> "Encoders":
        """Those of a checkpoint, loaded now if this latent cache hasn't seen them yet.

        Args:
            encoders_id: see `CheckpointSource`.
            latent_cache_dir: where the facts are kept.
            dtype: of the text encoder and the condition encoder.
            load: loads the pipeline that encodes.

        Raises:
            UsageError, RunError: the facts can't be written.
        """
        if encoders_id is None:
            return cls.of(load())
        told = json.dumps([encoders_id, str(dtype), [version(library) for library in _LIBRARIES]])
        name = f"encoders-{hashlib.sha256(told.encode()).hexdigest()[:32]}.safetensors"
        path = cache_folder(latent_cache_dir) / name
        facts = EncoderFacts.read(path)
        if facts is not None:
            return cls(facts, load)
        encoders = cls.of(load())
        encoders.facts.write(path)
        return encoders

    @property
    def are_loaded(self) -> bool:
        """Whether something has asked for the pipeline."""
        return "pipeline" in vars(self)

    @functools.cached_property
    def pipeline(self):
        """The pipeline, whose encoders are where they encode."""
        return self._load()


def fingerprint(*modules: torch.nn.Module) -> str:
    """SHA-256 over names, dtypes and values of all weights: the same model wherever it was loaded from."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
