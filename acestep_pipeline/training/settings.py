"""What the command line comes to: sources, adapter, texts, draws, what a resumed run must share, the card's rows.

The functions take the namespace of `arguments.parse_args`; nothing below them in the package does.
"""

import argparse
from pathlib import Path
from typing import Any

from ..adapters.settings import LoraSettings, describe_kind, parse_blocks, parse_targets
from ..data.text.normalisation import normalise_tags
from ..data.text.variants import TextOptions
from ..errors import UsageError
from ..paths import cache_dir, check_addresses, default_data, default_model
from ..storage.copies import is_remote
from ..storage.hub_address import is_on_hub, parse_hub_address
from ..storage.names import KINDS, address_of, is_address
from ..storage.remote_folder import can_stream
from ..storage.s3 import parse_address, shown
from .objective import timestep_shares
from .optimizers import describe_optimizer

# What makes a run the run it is: resuming under another value of any of these is refused.
RESUME_SETTINGS = (
    "rank", "lora_alpha", "lora_dropout", "lora_layers", "lora_blocks", "use_rslora", "use_dora", "adapter_type",
    "lokr_factor", "lokr_decompose_both", "rank_pattern", "alpha_pattern", "cfg_dropout", "timestep_mu",
    "timestep_sigma", "timestep_distribution", "timestep_mix", "timestep_steps", "timestep_shift",
    "stratified_timesteps", "antithetic_noise", "weighting_scheme", "snr_gamma", "seed", "effective_batch_size",
    "num_updates", "optimizer", "learning_rate", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power",
    "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm", "mixed_precision",
    "max_duration_s", "base_quantization", "trigger_word", "trigger_position", "tag_shuffle", "caption_dropout",
    "ema_decay",
)  # fmt: skip


def lora_settings(args: argparse.Namespace) -> LoraSettings:
    """The adapter that the flags describe.

    Raises:
        UsageError: one of them is out of bounds, or two don't go together.
    """
    return LoraSettings(
        r=args.rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=parse_targets(args.lora_layers),
        layers_to_transform=parse_blocks(args.lora_blocks),
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        adapter_type=args.adapter_type,
        lokr_factor=args.lokr_factor,
        lokr_decompose_both=args.lokr_decompose_both,
        rank_pattern=args.rank_pattern,
        alpha_pattern=args.alpha_pattern,
    )


def flags(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The flags of these names, for a function whose arguments are called the same."""
    return {name: getattr(args, name) for name in names}


def checkpoint_source(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `ACEStepPipeline.from_pretrained` that name the base model."""
    return flags(args, "pretrained_model_name_or_path", "variant_dir", "revision", "cache_dir")


def text_options(args: argparse.Namespace) -> TextOptions:
    """In which words tracks are told; raises `UsageError` for values that can't work."""
    trigger_word = normalise_tags(args.trigger_word or "")
    if args.trigger_word is not None and not trigger_word:
        raise UsageError(f"--trigger_word {args.trigger_word!r} holds no word; name a made-up one, or leave it out.")
    return TextOptions(
        trigger_word=trigger_word,
        trigger_position=args.trigger_position,
        tag_shuffle=args.tag_shuffle,
        caption_dropout=args.caption_dropout,
        seed=args.seed,
    )


def choose_sources(args: argparse.Namespace) -> dict[str, str]:
    """Fill in model, data and output where they were not named; returns what was chosen and why, for printing."""
    check_addresses(*vars(args).values())
    args.pretrained_model_name_or_path, model_from = default_model(
        args.pretrained_model_name_or_path, preset=args.preset
    )
    data = args.dataset_name
    data_from = "--dataset_name"
    if data is not None and args.train_data_dir is not None:
        raise UsageError("--dataset_name and --train_data_dir name two sources of data; give one of them.")
    if data is None:
        args.train_data_dir, data_from = default_data(args.train_data_dir)
        data = args.train_data_dir
    check_streaming(args.streaming, args.train_data_dir, args.validation_data_dir)
    if (flag := _needs_held_out(args)) and _holds_out_nothing(args):
        raise _no_held_out(flag)
    if args.exp_name is not None and (args.exp_name in ("", ".", "..") or "/" in args.exp_name):
        raise UsageError(f"--exp_name {args.exp_name!r} is no name; say where the run goes with --output_dir.")
    output_from = "--output_dir" if args.output_dir else "from --exp_name" if args.exp_name else "from preset and data"
    if args.push_to_s3 is not None:
        if is_remote(args.output_dir or ""):
            raise UsageError("--output_dir s3://… and --push_to_s3 both say where to publish; give one of them.")
        args.push_to_s3 = published_address(args.push_to_s3)
    elif is_remote(args.output_dir or ""):
        bucket, folder = parse_address(args.output_dir)
        args.push_to_s3, output_from = args.output_dir.rstrip("/"), "the local copy of what --output_dir names"
        args.output_dir = cache_dir() / "runs" / bucket / folder
    if is_on_hub(args.output_dir or ""):
        args.push_to_hub, args.hub_model_id = True, hub_repository(args.output_dir, args.hub_model_id)
        output_from = "the local copy of what --output_dir names"
        args.output_dir = cache_dir() / "runs" / "hf" / args.hub_model_id  # too short to be a bucket's name
    for name in ("cache_dir", "logging_dir"):
        if can_stream(getattr(args, name) or ""):
            raise UsageError(f"--{name} {getattr(args, name)}: only a folder of this machine will do there; name one.")
    if args.exp_name is None:
        args.exp_name = "-".join(filter(None, (args.preset, Path(data).resolve().name)))
    args.output_dir = Path(args.output_dir).expanduser() if args.output_dir else Path("output") / args.exp_name
    published = [shown(args.push_to_s3)] if args.push_to_s3 else []
    published += [f"hf://{args.hub_model_id}"] if args.push_to_hub and args.hub_model_id else []
    return {
        "Preset": args.preset or "none",
        "Model": f"{args.pretrained_model_name_or_path}  ({model_from})",
        "Data": f"{data}  ({data_from})",
        "Output": f"{args.output_dir}  ({output_from})",
        **({"Published": ", ".join(published)} if published else {}),
        "Optimizer": describe_optimizer(args.optimizer, learning_rate=args.learning_rate),
    }


def check_streaming(streaming: bool, *data_dirs: str | None) -> None:
    """Refuse `--streaming` of what is on this machine anyway, or is read by `datasets`."""
    if streaming and not any(data_dir and can_stream(data_dir) for data_dir in data_dirs):
        raise UsageError(
            "--streaming fetches the audio of --train_data_dir s3://… or hf://…, and the data is at no such address; "
            "leave it out."
        )


def published_address(name: str) -> str:
    """The address that --push_to_s3 names: an adapter's name means one below `lora/`.

    Raises:
        UsageError: it is neither a name nor an address.
    """
    if is_on_hub(name):
        raise UsageError(
            f"--push_to_s3 {name} is on the Hub; publish there with --push_to_hub --hub_model_id USER/NAME."
        )
    kind = name.partition("/")[0]
    address = address_of(name if kind in KINDS or is_address(name) else f"lora/{name}")
    if is_remote(address):
        parse_address(address)
    return address.rstrip("/")


def hub_repository(output_dir: str, hub_model_id: str | None) -> str:
    """The `user/name` of an `--output_dir hf://user/name`.

    Raises:
        UsageError: it is no such address, or `--hub_model_id` names another repository.
    """
    address = parse_hub_address(output_dir, kind="model")
    if address.revision or address.folder:
        raise UsageError(f"--output_dir {address}: a run is published to a repository; write {address.repository}.")
    if hub_model_id not in (None, address.repo_id):
        raise UsageError("--output_dir hf://… and --hub_model_id both say where to publish; give one of them.")
    return address.repo_id


def fill_model_defaults(args: argparse.Namespace, config, *, is_turbo: bool) -> None:
    """What depends on the checkpoint: turbo is distilled and never runs guidance, so it needs no condition dropout."""
    from ..flow_matching import TIMESTEP_MU, TIMESTEP_SIGMA
    from ..generation import SamplingSettings

    inference = SamplingSettings().resolved(is_turbo=is_turbo)
    if args.timestep_steps is None:
        args.timestep_steps = inference.num_inference_steps
    if args.timestep_shift is None:
        args.timestep_shift = inference.shift
    if args.cfg_dropout is None:
        args.cfg_dropout = 0.0 if is_turbo else 0.15
    if args.timestep_mu is None:
        args.timestep_mu = getattr(config, "timestep_mu", TIMESTEP_MU)
    if args.timestep_sigma is None:
        args.timestep_sigma = getattr(config, "timestep_sigma", TIMESTEP_SIGMA)


def validation_steps(
    args: argparse.Namespace, *, updates_per_epoch: int, items_per_update: int, num_held_out: int
) -> int:
    """Updates between validations, from --validation_steps, --validation_epochs or what is affordable.

    Raises:
        UsageError: a flag asks for validation, and no track is held out.
    """
    from .validator import default_validation_steps

    if not num_held_out and (flag := _needs_held_out(args)):
        raise _no_held_out(flag)
    if args.validation_epochs:
        return args.validation_epochs * updates_per_epoch
    return args.validation_steps or default_validation_steps(
        args.num_updates, items_per_update=items_per_update, num_passes=num_held_out * args.num_validation_draws
    )


def _needs_held_out(args: argparse.Namespace) -> str | None:
    """A flag that was given and says nothing without held-out tracks."""
    names = ("validation_steps", "validation_epochs", "early_stopping_patience")
    return next((name for name in names if getattr(args, name)), None)


def _no_held_out(flag: str) -> UsageError:
    return UsageError(
        f"--{flag} needs held-out tracks: --validation_fraction 0.1 holds a tenth of the tracks out, "
        "--validation_data_dir names others."
    )


def _holds_out_nothing(args: argparse.Namespace) -> bool:
    """Whether it is clear without reading any track that none is held out: where the data is on this machine."""
    from ..data.held_out import HELD_OUT_SPLIT, splits_of

    if args.validation_fraction or args.validation_data_dir or args.dataset_name or can_stream(args.train_data_dir):
        return False
    folder = Path(args.train_data_dir).expanduser()
    return folder.is_dir() and HELD_OUT_SPLIT not in splits_of(folder)


def draw_settings(args: argparse.Namespace, *, items_per_update: int):
    """What is random about an item, after `fill_model_defaults`; a `DrawSettings`."""
    from ..data.draws import DrawSettings
    from ..timesteps import TimestepDistribution

    return DrawSettings(
        seed=args.seed,
        cfg_dropout=args.cfg_dropout,
        timesteps=TimestepDistribution(
            shares=timestep_shares(args.timestep_distribution, args.timestep_mix),
            mu=args.timestep_mu,
            sigma=args.timestep_sigma,
            num_inference_steps=args.timestep_steps,
            shift=args.timestep_shift,
        ),
        stratified_timesteps=args.stratified_timesteps,
        items_per_update=items_per_update,
        antithetic_noise=args.antithetic_noise,
        weighting_scheme=args.weighting_scheme,
        snr_gamma=args.snr_gamma,
        tag_shuffle=args.tag_shuffle,
        caption_dropout=args.caption_dropout,
    )


def resume_settings(args: argparse.Namespace, *, held_out: list[str]) -> dict:
    """What must be the same when a run is resumed, `held_out` being the names of its held-out tracks. A run under a
    constant rate may be made longer."""
    settings = flags(args, *RESUME_SETTINGS)
    if held_out:
        names = (
            "num_validation_draws",
            "validation_seed",
            "validation_steps",
            "validation_epochs",
            "early_stopping_patience",
        )
        settings |= {"held_out": held_out, **flags(args, *names)}
    if args.lr_scheduler.startswith("constant"):
        settings["num_updates"] = None
    if args.torch_compile:  # checkpoints from before there was such a flag are of runs without it
        settings["torch_compile"] = True
    return settings


def describe_run(
    args: argparse.Namespace, facts: dict, *, dataset: dict, costs: list[tuple[str, str]]
) -> dict[str, Any]:
    """What the model card says of a run, as `model_card.CardFacts` has it; names of folders, and not where they lie.

    Args:
        facts: those of `setup.TrainingInputs`.
        dataset: `summarise_tracks` of what was trained on.
        costs: rows for its table, of what the run took.
    """
    kind = describe_kind(facts["lora"])
    data, dataset_id = args.dataset_name or args.train_data_dir, args.dataset_name
    if is_on_hub(data):
        dataset_id = parse_hub_address(data).repo_id
    elif dataset_id and Path(dataset_id).exists():
        dataset_id = None
    targets = ", ".join(facts["lora"]["target_modules"])
    rows = [
        ("base", f"SHA-256 of its DiT: `{facts['model_sha256'][:16]}…`"),
        ("preset", args.preset or "none"),
        kind,
        ("targets", targets + (f" of blocks {args.lora_blocks}" if args.lora_blocks else "")),
        ("updates", f"{args.num_updates} of {args.effective_batch_size} windows"),
        ("optimizer", args.optimizer),
        ("learning rate", f"{args.learning_rate:g}, {args.lr_scheduler}, {args.lr_warmup_steps} updates of warm-up"),
        ("precision, seed", f"{args.mixed_precision}, {args.seed}"),
        ("quantised base", args.base_quantization),
        *costs,
    ]
    return {
        "kind": kind[0],
        "rows": rows,
        "trigger_words": facts.get("trigger_words", [])[:20],
        "dataset": dataset,
        "dataset_name": dataset_id or Path(str(data)).expanduser().resolve().name,
        "dataset_id": dataset_id,
        "license": args.license,
    }
