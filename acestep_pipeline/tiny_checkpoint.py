"""The embedded default: a real-class ACE-Step 1.5 checkpoint of a few MB at toy width, built from a seed, offline.

Its weights are random: what it generates is noise-like texture, not music. It exists so that every line of the real
path (tokenizer, text encoder, VAE, condition encoder, DiT, LoRA loader) runs on any machine within seconds.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AceStepPipeline,
    AceStepTransformer1DModel,
    AutoencoderOobleck,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.pipelines.ace_step import AceStepAudioTokenDetokenizer, AceStepAudioTokenizer, AceStepConditionEncoder
from filelock import FileLock
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from .errors import RunError, UsageError
from .files import is_taken
from .paths import cache_dir
from .progress import quiet_loading

TINY_NAME = "tiny"
# Part of the cache folder's name: raise it when anything below changes the weights.
TINY_VERSION = 1
LATENT_CHANNELS = 16
WIDTH = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 64,
}
# Texts like those the model is given, so that the byte-pair merges keep a prompt within the 256-token limit.
TOKENIZER_TEXTS = (
    "# Instruction\nFill the audio semantic mask based on the given conditions:\n\n# Caption\n",
    "\n\n# Metas\n- bpm: N/A\n- timesignature: N/A\n- keyscale: N/A\n- duration: 30 seconds\n",
    "- bpm: 120\n- timesignature: 4\n- keyscale: C major\n- duration: 60 seconds\n- keyscale: A minor\n",
    "# Languages\nen\n\n# Lyric\n[Instrumental]\n[verse]\n[chorus]\n[bridge]\n[intro]\n[outro]\nunknown",
    "electronic, ambient, metal, rock, orchestral, cinematic, techno, synthwave, funk, lo-fi hip hop, waltz, jazz, ",
    "warm pads, drums, bass, guitar, piano, strings, synth lead, energetic, calm, dark, bright, instrumental, vocal",
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every text has an encoding; common prompt words are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        min_frequency=1,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TOKENIZER_TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=32768
    )


def _build_vae(generator: torch.Generator) -> AutoencoderOobleck:
    """Real strides (2·4·4·6·10 = 1920 samples a frame at 48 kHz), toy width, latents of about unit variance."""
    vae = AutoencoderOobleck(
        encoder_hidden_size=2 * LATENT_CHANNELS,
        downsampling_ratios=[2, 4, 4, 6, 10],
        channel_multiples=[1, 1, 1, 2, 2],
        decoder_channels=LATENT_CHANNELS,
        decoder_input_channels=LATENT_CHANNELS,
        audio_channels=2,
        sampling_rate=48000,
    ).eval()
    with torch.no_grad():
        mean, bias = vae.encoder.conv2.weight_g[:LATENT_CHANNELS], vae.encoder.conv2.bias[:LATENT_CHANNELS]
        calibration = 0.2 * torch.randn(1, 2, 48000, generator=generator)
        latents = vae.encode(calibration).latent_dist.mean
        scale = 1.0 / latents.std(dim=(0, 2))
        # conv2 is linear: scaling its gain and bias channel by channel scales the latents' mean alike.
        mean.mul_(scale.view(-1, 1, 1))
        bias.sub_(latents.mean(dim=(0, 2))).mul_(scale).add_(0.1)
        # softplus(-6) = 0.0025: a posterior as narrow, relative to the latents, as a trained VAE's.
        vae.encoder.conv2.weight_g[LATENT_CHANNELS:] *= 0.1
        vae.encoder.conv2.bias[LATENT_CHANNELS:] = -6.0
    return vae


def build_tiny_pipeline(seed: int = 0) -> AceStepPipeline:
    """The pipeline with all eight components, fp32, deterministic from `seed`; leaves the global RNG as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        tokenizer = build_tokenizer()
        text_encoder = Qwen3Model(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=48,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
                max_position_embeddings=4096,
                # Embeddings of unit scale, as a trained table's; the default 0.02 leaves prompts nearly alike.
                initializer_range=0.2,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        vae = _build_vae(generator)
        transformer = AceStepTransformer1DModel(
            **WIDTH,
            num_hidden_layers=4,
            in_channels=3 * LATENT_CHANNELS,
            audio_acoustic_hidden_dim=LATENT_CHANNELS,
            model_version="base",
        )
        condition_encoder = AceStepConditionEncoder(
            **WIDTH,
            text_hidden_dim=48,
            timbre_hidden_dim=LATENT_CHANNELS,
            num_lyric_encoder_hidden_layers=2,
            num_timbre_encoder_hidden_layers=2,
        )
        with torch.no_grad():
            frames = condition_encoder.silence_latent.shape[1]
            silence = vae.encode(torch.zeros(1, 2, 64 * 1920)).latent_dist.mean.transpose(1, 2)
            # Away from its ends, encoded silence repeats one frame.
            inner = silence[:, 32:33].expand(1, frames - 64, -1)
            condition_encoder.silence_latent.copy_(torch.cat([silence[:, :32], inner, silence[:, 32:]], dim=1))
        token_width = {**WIDTH, "audio_acoustic_hidden_dim": LATENT_CHANNELS, "num_attention_pooler_hidden_layers": 1}
        pipeline = AceStepPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
            condition_encoder=condition_encoder,
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
            audio_tokenizer=AceStepAudioTokenizer(**token_width, fsq_dim=WIDTH["hidden_size"]),
            audio_token_detokenizer=AceStepAudioTokenDetokenizer(**token_width),
        )
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    return pipeline


def write_tiny_checkpoint(directory: Path, *, seed: int = 0) -> Path:
    """Write the tiny checkpoint in diffusers layout; a finished name is a finished checkpoint.

    Raises:
        UsageError: `directory` exists and is not empty, or can't be written.
    """
    directory = Path(directory)
    if is_taken(directory):
        raise UsageError(f"{directory} exists already and is not an empty folder; name another, or remove it.")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    except OSError as error:
        raise UsageError(f"{directory} can't be written ({error.strerror}); name a folder that can.") from error
    try:
        with quiet_loading():
            pipeline = build_tiny_pipeline(seed)
            # In a distributed run transformers would leave the weights to process 0, which may be on another machine.
            pipeline.text_encoder.should_save_on_this_rank = lambda is_main_process: is_main_process
            pipeline.save_pretrained(temporary / "checkpoint")
        os.replace(temporary / "checkpoint", directory)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{directory} can't be written ({error}); make room, and run this again.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def tiny_checkpoint_path() -> Path:
    """The tiny checkpoint in the cache folder, written there by the first call on a machine."""
    directory = cache_dir() / f"tiny-v{TINY_VERSION}"
    if not (directory / "model_index.json").is_file():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(directory.with_suffix(".lock")):
            if not (directory / "model_index.json").is_file():
                print(f"Writing the embedded tiny checkpoint to {directory}", file=sys.stderr, flush=True)
                write_tiny_checkpoint(directory)
    return directory


def size_bytes(directory: Path) -> int:
    """Bytes of all files under `directory`."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
