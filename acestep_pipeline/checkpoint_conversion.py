"""The original ACE-Step 1.5 checkpoint layout, read into diffusers' classes.

Original layout: `<dit>/config.json`, `<dit>/model.safetensors` (or shards with `model.safetensors.index.json`) and
`<dit>/silence_latent.pt` (`[1, 64, frames]`), with `vae/` and `Qwen3-Embedding-0.6B/` beside the DiT's folder.
"""

import contextlib
import json
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AceStepTransformer1DModel, AutoencoderOobleck, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ace_step import AceStepAudioTokenDetokenizer, AceStepAudioTokenizer, AceStepConditionEncoder
from safetensors import SafetensorError, safe_open
from transformers import AutoModel, AutoTokenizer

from .errors import UsageError

WEIGHTS_NAME = "model.safetensors"
WEIGHTS_INDEX_NAME = "model.safetensors.index.json"
SILENCE_LATENT_NAME = "silence_latent.pt"
TEXT_ENCODER_DIR = "Qwen3-Embedding-0.6B"
VAE_DIR = "vae"

# Top-level prefix in the original file -> component of the diffusers pipeline.
COMPONENT_PREFIXES = {
    "decoder.": "transformer",
    "encoder.": "condition_encoder",
    "tokenizer.": "audio_tokenizer",
    "detokenizer.": "audio_token_detokenizer",
}
DIT_CLASSES = {
    "transformer": AceStepTransformer1DModel,
    "condition_encoder": AceStepConditionEncoder,
    "audio_tokenizer": AceStepAudioTokenizer,
    "audio_token_detokenizer": AceStepAudioTokenDetokenizer,
}
# Original module name -> diffusers module name, as whole path components.
MODULE_RENAMES = {
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "o_proj": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
    "proj_in.1": "proj_in_conv",
    "proj_out.1": "proj_out_conv",
}


@dataclass(frozen=True)
class OriginalCheckpoint:
    """Where the parts of a checkpoint in the original layout lie on disk."""

    dit: Path
    vae: Path
    text_encoder: Path


def is_dit_folder(folder: Path) -> bool:
    """Whether `folder` holds a DiT in the original layout."""
    return (folder / "config.json").is_file() and any(
        (folder / name).is_file() for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    )


def locate_original(folder: Path, variant_dir: str | None) -> OriginalCheckpoint:
    """Find the DiT, the VAE and the text encoder of an original-layout checkpoint.

    Args:
        folder: the checkpoint folder, or the DiT's own folder with `vae/` and the text encoder inside or beside it.
        variant_dir: which DiT to take where the folder holds several, e.g. `acestep-v15-base`.

    Raises:
        UsageError: a component is missing, or several DiTs are there and `variant_dir` is not given.
    """
    if variant_dir is not None:
        dit = folder / variant_dir
        if not is_dit_folder(dit):
            found = ", ".join(child.name for child in _dit_children(folder)) or "none"
            raise UsageError(
                f"{folder} has no DiT in {variant_dir!r} (config.json and {WEIGHTS_NAME}); found: {found}. "
                "Choose one of these with --variant_dir."
            )
    elif is_dit_folder(folder) and (folder / SILENCE_LATENT_NAME).is_file():
        dit = folder
    else:
        candidates = _dit_children(folder)
        if not candidates and any(folder.glob("diffusion_pytorch_model*.safetensors")):
            raise UsageError(
                f"{folder} is one component of a checkpoint in diffusers' layout and no whole one; put it in its "
                "place (a transformer: transformer/) in a copy of the whole checkpoint, and name that."
            )
        if not candidates:
            raise UsageError(
                f"{folder} is no ACE-Step 1.5 checkpoint: it has neither model_index.json (diffusers layout) nor a "
                f"folder with config.json, {WEIGHTS_NAME} and {SILENCE_LATENT_NAME} (original layout)."
            )
        if len(candidates) > 1:
            names = ", ".join(child.name for child in candidates)
            raise UsageError(f"{folder} holds several DiTs ({names}); choose one with --variant_dir.")
        dit = candidates[0]
    if not (dit / SILENCE_LATENT_NAME).is_file():
        raise UsageError(f"{dit} has no {SILENCE_LATENT_NAME}, which every ACE-Step 1.5 DiT needs; download it again.")
    around = (folder, dit, dit.parent)
    return OriginalCheckpoint(
        dit=dit, vae=_find_beside(around, VAE_DIR), text_encoder=_find_beside(around, TEXT_ENCODER_DIR)
    )


def _dit_children(folder: Path) -> list[Path]:
    """Sub-folders that are DiTs; the 5 Hz language models beside them have no silence latent."""
    return sorted(
        child
        for child in folder.iterdir()
        if child.is_dir() and is_dit_folder(child) and (child / SILENCE_LATENT_NAME).is_file()
    )


def _find_beside(folders: tuple[Path, ...], name: str) -> Path:
    for folder in folders:
        if (folder / name / "config.json").is_file():
            return folder / name
    raise UsageError(
        f"{folders[0]} has no component {name!r} ({name}/config.json); copy it there from ACE-Step/Ace-Step1.5, "
        "which holds it."
    )


def convert_key(key: str) -> tuple[str, str]:
    """Original parameter name -> (pipeline component, name within it); raises `ValueError` for an unknown name."""
    if key == "null_condition_emb":
        return "condition_encoder", key
    for prefix, component in COMPONENT_PREFIXES.items():
        if key.startswith(prefix):
            name = f".{key.removeprefix(prefix)}"
            for original, renamed in MODULE_RENAMES.items():
                name = name.replace(f".{original}.", f".{renamed}.")
            return component, name.removeprefix(".")
    raise ValueError(f"it has an unknown parameter {key!r}")


def component_configs(config: dict, shapes: dict[str, tuple[int, ...]]) -> dict[str, dict]:
    """Constructor arguments of the four components, from the original `config.json` and the parameters' shapes.

    XL's condition encoder is narrower than its DiT and is described by the `encoder_*` keys.
    """
    shared = {
        "head_dim": config["head_dim"],
        "rope_theta": float(config["rope_theta"]),
        "attention_bias": config["attention_bias"],
        "attention_dropout": config["attention_dropout"],
        "rms_norm_eps": config["rms_norm_eps"],
        "sliding_window": config["sliding_window"],
    }
    width_keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    dit_width = {key: config[key] for key in width_keys}
    encoder_width = {key: config.get(f"encoder_{key}") or config[key] for key in width_keys}
    # The audio tokenizer follows the DiT's width or the encoder's, depending on the release: its weights tell.
    token_hidden_size = shapes.get("tokenizer.audio_acoustic_proj.weight", (encoder_width["hidden_size"],))[0]
    token_width = encoder_width if token_hidden_size == encoder_width["hidden_size"] else dit_width
    pooler = {
        **shared,
        **token_width,
        "audio_acoustic_hidden_dim": config["audio_acoustic_hidden_dim"],
        "pool_window_size": config["pool_window_size"],
        "num_attention_pooler_hidden_layers": config["num_attention_pooler_hidden_layers"],
    }
    return {
        "transformer": {
            **shared,
            **dit_width,
            "num_hidden_layers": config["num_hidden_layers"],
            "in_channels": config["in_channels"],
            "audio_acoustic_hidden_dim": config["audio_acoustic_hidden_dim"],
            "patch_size": config["patch_size"],
            "layer_types": config.get("layer_types"),
            "encoder_hidden_size": encoder_width["hidden_size"],
            "is_turbo": bool(config.get("is_turbo", False)),
            "model_version": config.get("model_version"),
        },
        "condition_encoder": {
            **shared,
            **encoder_width,
            "text_hidden_dim": config["text_hidden_dim"],
            "timbre_hidden_dim": config["timbre_hidden_dim"],
            "num_lyric_encoder_hidden_layers": config["num_lyric_encoder_hidden_layers"],
            "num_timbre_encoder_hidden_layers": config["num_timbre_encoder_hidden_layers"],
        },
        "audio_tokenizer": {
            **pooler,
            "fsq_dim": config["fsq_dim"],
            "fsq_input_levels": config["fsq_input_levels"],
            "fsq_input_num_quantizers": config["fsq_input_num_quantizers"],
        },
        "audio_token_detokenizer": pooler,
    }


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can't be read as JSON ({error}); download it again.") from error


def _read_silence_latent(path: Path) -> torch.Tensor:
    """`[1, frames, channels]`, as the condition encoder holds it; the file has the last two the other way round."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu").transpose(1, 2).contiguous()
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        what = " ".join(str(error).split())[:200]
        raise UsageError(f"{path} is missing or damaged ({what}); download it again.") from error


def _iter_weights(dit: Path, names: bool = False) -> Iterator[tuple[str, object]]:
    """Yield (name, tensor), or (name, shape) with `names`, reading one tensor at a time from the mapped file(s)."""
    files = [WEIGHTS_NAME]
    if (dit / WEIGHTS_INDEX_NAME).is_file():
        shard_of = _read_json(dit / WEIGHTS_INDEX_NAME).get("weight_map", {})
        files = sorted(set(shard_of.values()))
    for name in files:
        if not (dit / name).is_file():
            raise UsageError(f"{dit} lacks {name}; download it again, complete.")
        try:
            with safe_open(dit / name, "pt") as file:
                for key in file.keys():
                    yield key, tuple(file.get_slice(key).get_shape()) if names else file.get_tensor(key)
        except SafetensorError as error:
            raise UsageError(f"{dit / name} is damaged ({error}); download it again.") from error


def load_dit_components(
    dit: Path,
    torch_dtype: torch.dtype | None = torch.float32,
    *,
    wanted: Iterable[str] = tuple(DIT_CLASSES),
) -> dict[str, torch.nn.Module]:
    """Build the transformer, condition encoder, audio tokenizer and detokenizer from an original DiT folder.

    Args:
        dit: folder with `config.json`, weights and `silence_latent.pt`.
        torch_dtype: dtype of the parameters; None leaves them in that of the file, and mapped to it.
        wanted: the only components to build; of the others nothing is read.

    Returns:
        The modules by pipeline component name, in eval mode, on the CPU.

    Raises:
        UsageError: a parameter is missing, unknown or of another shape than the config says.
    """
    config = _read_json(dit / "config.json")
    shapes = dict(_iter_weights(dit, names=True))
    state_dicts: dict[str, dict[str, torch.Tensor]] = {component: {} for component in DIT_CLASSES}
    for key, tensor in _iter_weights(dit):
        try:
            component, name = convert_key(key)
        except ValueError as error:
            raise UsageError(f"{dit} is not an ACE-Step 1.5 DiT: {error}.") from error
        if component in wanted:
            state_dicts[component][name] = tensor if torch_dtype is None else tensor.to(torch_dtype)
    silence = _read_silence_latent(dit / SILENCE_LATENT_NAME)
    parameter = next((tensor for state in state_dicts.values() for tensor in state.values()), silence)
    state_dicts["condition_encoder"]["silence_latent"] = silence.to(parameter.dtype)

    try:
        arguments_of = component_configs(config, shapes)
    except KeyError as error:
        raise UsageError(f"{dit / 'config.json'} has no {error}: it is not an ACE-Step 1.5 DiT's.") from error
    components = {}
    for component, arguments in arguments_of.items():
        if component not in wanted or (component.startswith("audio_") and not state_dicts[component]):
            continue
        with torch.device("meta"):
            module = DIT_CLASSES[component](**arguments)
        # Buffers that files don't hold (FSQ levels) must be real, so only parameters and persistent buffers are meta.
        module = _materialise(module, DIT_CLASSES[component], arguments)
        try:
            module.load_state_dict(state_dicts.pop(component), strict=True, assign=True)
        except RuntimeError as error:
            what = " ".join(str(error).split())[:300]
            raise UsageError(f"{dit}: the weights don't fit its config.json ({component}): {what}") from error
        components[component] = module.eval().requires_grad_(False)
    # diffusers' config has no place for the training distribution of timesteps; training reads it from here.
    timesteps = {name: config[name] for name in ("timestep_mu", "timestep_sigma") if name in config}
    if "transformer" in components:
        components["transformer"].register_to_config(**timesteps)
    return components


def _materialise(module: torch.nn.Module, cls: type, arguments: dict) -> torch.nn.Module:
    """A module whose non-persistent buffers hold values: `module` if it has none, else one built on the CPU."""
    persistent = set(module.state_dict())
    if all(name in persistent for name, _ in module.named_buffers()):
        return module
    return cls(**arguments)


def load_vae(folder: Path, torch_dtype: torch.dtype | None) -> AutoencoderOobleck:
    """The VAE of an original-layout checkpoint, which is in diffusers' layout; None: in the dtype of its file."""
    with _loading(folder):
        return AutoencoderOobleck.from_pretrained(folder, dtype=torch_dtype or _stored_dtype(folder))


def load_text_encoder(folder: Path, torch_dtype: torch.dtype | None) -> tuple[torch.nn.Module, object]:
    """The text encoder and its tokenizer; None: in the dtype of its file."""
    with _loading(folder):
        return AutoModel.from_pretrained(folder, dtype=torch_dtype or "auto"), AutoTokenizer.from_pretrained(folder)


def _stored_dtype(folder: Path) -> torch.dtype:
    """That of the weights in a folder (diffusers has no "auto")."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                return file.get_tensor(name).dtype
    raise OSError(f"there are no weights in {folder}")


@contextlib.contextmanager
def _loading(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        what = " ".join(str(error).split())[:300]
        raise UsageError(f"{folder} can't be loaded ({what}); download it again.") from error


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The pipeline computes the shifted sigmas itself; the scheduler takes them as they are."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0)


def load_original(
    checkpoint: OriginalCheckpoint,
    *,
    torch_dtype: torch.dtype,
    vae_dtype: torch.dtype,
    transformer: torch.nn.Module | None = None,
) -> dict:
    """All pipeline components of an original-layout checkpoint, as keyword arguments of the pipeline's class.

    A `transformer` that is given is not loaded.
    """
    wanted = [name for name in DIT_CLASSES if transformer is None or name != "transformer"]
    components = load_dit_components(checkpoint.dit, torch_dtype, wanted=wanted)
    components.setdefault("transformer", transformer)
    components.setdefault("audio_tokenizer", None)
    components.setdefault("audio_token_detokenizer", None)
    components["vae"] = load_vae(checkpoint.vae, vae_dtype)
    components["text_encoder"], components["tokenizer"] = load_text_encoder(checkpoint.text_encoder, torch_dtype)
    components["scheduler"] = build_scheduler()
    return components
