"""Writes the original checkpoint layout; its names are spelt out here, independently of the code under test."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def original_name(component: str, name: str) -> str:
    """diffusers' parameter name -> the original file's."""
    if component == "condition_encoder" and name == "null_condition_emb":
        return name
    for renamed, original in (
        (".to_q.", ".q_proj."),
        (".to_k.", ".k_proj."),
        (".to_v.", ".v_proj."),
        (".to_out.0.", ".o_proj."),
        (".norm_q.", ".q_norm."),
        (".norm_k.", ".k_norm."),
        ("proj_in_conv.", "proj_in.1."),
        ("proj_out_conv.", "proj_out.1."),
    ):
        name = name.replace(renamed, original)
    prefix = {
        "transformer": "decoder",
        "condition_encoder": "encoder",
        "audio_tokenizer": "tokenizer",
        "audio_token_detokenizer": "detokenizer",
    }[component]
    return f"{prefix}.{name}"


def original_config(modules: dict[str, torch.nn.Module]) -> dict:
    """An original `config.json`, with XL's `encoder_*` keys where the condition encoder is narrower than the DiT."""
    dit, encoder = modules["transformer"].config, modules["condition_encoder"].config
    config = {**modules["audio_tokenizer"].config, **encoder, **dit, "timestep_mu": -0.4, "timestep_sigma": 1.0}
    config["layer_types"] = modules["transformer"].layer_types
    if encoder.hidden_size != dit.hidden_size:
        widths = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        config |= {f"encoder_{name}": encoder[name] for name in widths}
    return {name: value for name, value in config.items() if not name.startswith("_")}


def write_original_dit(modules: dict[str, torch.nn.Module], directory: Path) -> None:
    """Write the four DiT components as `config.json`, `model.safetensors` and `silence_latent.pt`."""
    directory.mkdir(parents=True)
    weights = {
        original_name(component, name): tensor.contiguous()
        for component, module in modules.items()
        for name, tensor in module.state_dict().items()
        if name != "silence_latent"
    }
    save_file(weights, directory / "model.safetensors")
    silence = modules["condition_encoder"].silence_latent
    torch.save(silence.transpose(1, 2).contiguous(), directory / "silence_latent.pt")
    (directory / "config.json").write_text(json.dumps(original_config(modules)))


def write_original_checkpoint(pipeline, directory: Path, variant: str = "acestep-v15-base") -> Path:
    """A whole pipeline in the original layout: the DiT's folder, `vae/` and the text encoder with its tokenizer."""
    names = ("transformer", "condition_encoder", "audio_tokenizer", "audio_token_detokenizer")
    write_original_dit({name: getattr(pipeline, name) for name in names}, directory / variant)
    pipeline.vae.save_pretrained(directory / "vae")
    pipeline.text_encoder.save_pretrained(directory / "Qwen3-Embedding-0.6B")
    pipeline.tokenizer.save_pretrained(directory / "Qwen3-Embedding-0.6B")
    return directory
