"""`ACEStepPipeline`: diffusers' `AceStepPipeline` that loads every checkpoint layout and says what is wrong."""

import contextlib
import functools
import inspect
import os

import torch
from diffusers import AceStepPipeline
from diffusers.models.transformers.ace_step_transformer import AceStepTransformerBlock
from safetensors import SafetensorError

from .adapters import hotswap as adapter_hotswap
from .adapters.formats.install import diffusers_state, free_name, install_factors, is_plain_lora, layer_shapes
from .adapters.formats.locate import load_adapter
from .adapters.switching import AdapterSwitching
from .adapters.weights import check_not_fused
from .checkpoint_conversion import OriginalCheckpoint, load_original
from .checkpoint_source import resolve_checkpoint
from .condition_mask import padding_hidden
from .errors import UsageError
from .progress import quiet_loading
from .prompt_fields import checked_request

# Encoding in tiles of 5 s: larger ones are half as fast on a CPU (glibc maps buffers above 32 MB anew each time) and
# cost memory on a GPU. An Oobleck encoder frame depends on less than 0.3 s of audio to either side (3 residual units
# with dilations 1, 3, 9 and kernel 7 at strides 1, 2, 8, 32, 192), so 12 frames of overlap make the tiles equal to one
# pass up to rounding.
ENCODE_TILE_FRAMES = 125
ENCODE_OVERLAP_FRAMES = 12
# Decoding in tiles of 10 s, where diffusers takes 20 s and 2.6 s to either side: half the memory, a sixth less work. A
# sample depends on fewer than 8 frames to either side (measured: with 8 the tiles equal one pass to 3e-7, with 4 they
# are out by 2e-3).
DECODE_TILE_FRAMES = 250
DECODE_OVERLAP_FRAMES = 12

# Of the VAE's posterior, where audio is an input.
SOURCE_SEED = 0


def tile_audio_coding(vae: torch.nn.Module) -> None:
    """Have an `AutoencoderOobleck` encode and decode in tiles of the sizes above."""
    vae.tile_sample_min_length = ENCODE_TILE_FRAMES * vae.hop_length
    vae.tile_sample_overlap = ENCODE_OVERLAP_FRAMES * vae.hop_length
    vae.tile_latent_min_length = DECODE_TILE_FRAMES
    vae.tile_latent_overlap = DECODE_OVERLAP_FRAMES
    vae.enable_tiling()


def prepend_timbre_special_token(condition_encoder: torch.nn.Module) -> None:
    """Make the timbre encoder put its learned `special_token` before the projected timbre frames, as XL needs.

    The official XL code takes the timbre embedding from that token's position; diffusers 0.42.1 loads the weight but
    never prepends it. `tests/test_pipeline.py::test_diffusers_still_ignores_the_timbre_special_token` fails once
    diffusers does, and this function can go.
    """
    timbre_encoder = condition_encoder.timbre_encoder

    def prepend(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        token = timbre_encoder.special_token.to(output.dtype).expand(output.shape[0], -1, -1)
        return torch.cat([token, output], dim=1)

    if not getattr(timbre_encoder, "_prepends_special_token", False):
        timbre_encoder.embed_tokens.register_forward_hook(prepend)
        timbre_encoder._prepends_special_token = True


class ACEStepPipeline(AdapterSwitching, AceStepPipeline):
    """`diffusers.AceStepPipeline` plus the original checkpoint layout, tiled audio coding and XL's timbre token.

    `adapters.switching` has the methods that choose adapters. Everything else (`__call__`, `disable_lora`,
    `unload_lora_weights`, …) is diffusers'.
    """

    def __init__(
        self,
        vae,
        text_encoder,
        tokenizer,
        transformer,
        condition_encoder,
        scheduler,
        audio_tokenizer=None,
        audio_token_detokenizer=None,
    ):
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
            condition_encoder=condition_encoder,
            scheduler=scheduler,
            audio_tokenizer=audio_tokenizer,
            audio_token_detokenizer=audio_token_detokenizer,
        )
        if vae is not None:
            tile_audio_coding(vae)
        if transformer is not None:
            # What `compile_repeated_blocks` compiles; diffusers 0.42.1 doesn't say it of this class
            # (`tests/test_adapter_hotswap.py::test_diffusers_still_names_no_repeated_blocks`).
            transformer._repeated_blocks = [AceStepTransformerBlock.__name__]
        if condition_encoder is not None and transformer is not None:
            # Only XL has a condition encoder narrower than its DiT.
            if condition_encoder.config.hidden_size < transformer.config.hidden_size:
                prepend_timbre_special_token(condition_encoder)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        variant_dir: str | None = None,
        torch_dtype: torch.dtype = torch.float32,
        vae_dtype: torch.dtype | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        transformer: torch.nn.Module | None = None,
        **kwargs,
    ) -> "ACEStepPipeline":
        """Load a checkpoint.

        Args:
            pretrained_model_name_or_path: `"tiny"` (the embedded toy checkpoint), a folder in diffusers or original
                layout, or an `s3://` address or Hub id of either layout.
            variant_dir: which DiT of an original-layout checkpoint, e.g. `"acestep-v15-base"`.
            torch_dtype: dtype of every component but the VAE.
            vae_dtype: dtype of the VAE; `torch_dtype` if None.
            revision: branch, tag or commit on the Hub.
            cache_dir: the Hub's download cache.
            transformer: one that is loaded already; None loads the checkpoint's.
            kwargs: for diffusers' `from_pretrained` (diffusers layout only).

        Raises:
            UsageError: nothing is there, or a component is missing.
        """
        vae_dtype = vae_dtype or torch_dtype
        source = resolve_checkpoint(
            str(pretrained_model_name_or_path), variant_dir=variant_dir, revision=revision, cache_dir=cache_dir
        )
        with quiet_loading():
            if isinstance(source, OriginalCheckpoint):
                dtypes = {"torch_dtype": torch_dtype, "vae_dtype": vae_dtype}
                return cls(**load_original(source, **dtypes, transformer=transformer))
            if transformer is not None:
                kwargs["transformer"] = transformer
            try:
                return super().from_pretrained(source, dtype={"default": torch_dtype, "vae": vae_dtype}, **kwargs)
            except (OSError, ValueError, SafetensorError) as error:
                what = " ".join(str(error).split())[:300]
                raise UsageError(f"the checkpoint in {source} can't be loaded: {what}") from error

    @functools.wraps(AceStepPipeline.__call__)
    def __call__(self, *args, adapters=None, adapter_schedule=None, **kwargs):
        request = inspect.signature(AceStepPipeline.__call__).bind(self, *args, **kwargs).arguments
        request = checked_request({name: value for name, value in request.items() if name != "self"})
        # Neither the other items of a batch nor torch's global generator change what an item sounds like: padded
        # condition tokens are not attended to, and audio given as source or reference is always encoded with the same
        # draw from the VAE's posterior.
        with contextlib.ExitStack() as contexts:
            contexts.enter_context(padding_hidden(self.condition_encoder, self.transformer))
            if request.get("src_audio") is not None or request.get("reference_audio") is not None:
                devices = [self._execution_device] if self._execution_device.type == "cuda" else []
                contexts.enter_context(torch.random.fork_rng(devices))
                torch.manual_seed(SOURCE_SEED)
            return super().__call__(adapters=adapters, adapter_schedule=adapter_schedule, **request)

    def check_inputs(self, *args, **kwargs) -> None:
        """diffusers', whose sentences are `UsageError`s like all others."""
        try:
            super().check_inputs(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise UsageError(str(error)) from error

    def encode_prompt(self, prompt: str | list[str], lyrics: str | list[str], *args, **kwargs):
        """diffusers', with the same lyrics for all prompts where they are one text: it fails then, though that is its
        own default."""
        if isinstance(prompt, list) and isinstance(lyrics, str):
            lyrics = [lyrics] * len(prompt)
        return super().encode_prompt(prompt, lyrics, *args, **kwargs)

    def move_encoders(self, device: torch.device) -> None:
        """Move what encodes (VAE, text encoder, condition encoder) to `device`; the DiT stays where it is.

        Encoding needs no more, so that the device never has to hold the DiT and the encoders at the same time.
        """
        for encoder in (self.vae, self.text_encoder, self.condition_encoder):
            encoder.to(device)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        *,
        strict: bool = True,
        hotswap: bool = False,
        low_cpu_mem_usage: bool = True,
        **where,
    ) -> None:
        """Load an adapter of any format (`adapters.formats`), with the strength that it was trained with.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder, a Hub id, `s3://bucket/folder`, or a state dict.
            adapter_name: what to call it; `default_<number>` if None.
            strict: False makes a warning of what is an error otherwise: no layer, or not all of it, is for this
                transformer, or all weights are zero.
            hotswap: put it in the place of the adapter of that name (see `enable_lora_hotswap`).
            low_cpu_mem_usage: diffusers'.
            where: `weight_name`, `subfolder`, `revision`, `cache_dir`, `token`: which file of a folder or repository.

        Raises:
            UsageError: it is not there, is damaged or a pickle, or does not fit this transformer. The pipeline is then
                as it was before.
        """
        check_not_fused(self.transformer)
        source = pretrained_model_name_or_path_or_dict
        name = "given as a state dict" if isinstance(source, dict) else repr(str(source))
        try:
            adapter_name = adapter_name or free_name(self.transformer)
            if not hotswap and adapter_name in getattr(self.transformer, "peft_config", {}):
                raise ValueError(f"the name {adapter_name} is in use already; unload that one, or choose another")
            if "." in adapter_name or hasattr(torch.nn.ModuleDict(), adapter_name):
                raise ValueError(f"{adapter_name!r} can't be an adapter's name; take one without dots")
            shapes = layer_shapes(self.transformer)
            # All checks come before diffusers changes the transformer: it does not restore it when one fails.
            adapter = load_adapter(source, layer_shapes=shapes, strict=strict, **where)
            if not adapter.modules:
                return
            with quiet_loading():
                if is_plain_lora(adapter):
                    state_dict, metadata = diffusers_state(adapter)
                    self.load_lora_into_transformer(
                        state_dict,
                        self.transformer,
                        adapter_name=adapter_name,
                        metadata=metadata,
                        _pipeline=self,
                        low_cpu_mem_usage=low_cpu_mem_usage,
                        hotswap=hotswap,
                    )
                else:
                    adapter_hotswap.load(
                        self.transformer,
                        None,
                        None,
                        adapter_name=adapter_name,
                        hotswap=hotswap,
                        load_anew=lambda *_: install_factors(self.transformer, adapter, adapter_name),
                    )
            if not hotswap:
                # PEFT turns off the adapters of the same kind only.
                self.set_adapters(adapter_name)
            # diffusers leaves the new layers in training mode, with the dropout that the file may name.
            self.transformer.train(self.transformer.training)
        except (RuntimeError, ValueError, OSError, SafetensorError) as error:
            what = " ".join(str(error).split())[:400].rstrip(".")
            raise UsageError(f"the adapter {name} doesn't load into this checkpoint: {what}.") from error
