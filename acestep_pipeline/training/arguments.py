"""The training script's command line: arguments, their checks, and what is filled in where nothing was said."""

import argparse
import math
import os
from pathlib import Path

from ..adapter_settings import LoraSettings, describe_kind, parse_blocks, parse_targets, read_lora_config
from ..data.text.normalisation import normalise_tags
from ..data.text.variants import TextOptions
from ..errors import UsageError
from ..paths import default_data, default_model
from ..presets import load_preset, preset_names
from .batch_size import choose_batch_size
from .launch import check_launch
from .memory import QUANTIZATION_PACKAGES, check_quantization_installed
from .objective import TIMESTEP_COMPONENTS, WEIGHTING_SCHEMES, check_objective, timestep_shares
from .optimizers import (
    DEFAULT_LEARNING_RATE,
    check_optimizer,
    choose_eight_bit,
    default_learning_rate,
    describe_optimizer,
)
from .tracking import check_trackers

LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
# What makes a run the run it is: resuming under another value of any of these is refused.
RESUME_SETTINGS = (
    "rank", "lora_alpha", "lora_dropout", "lora_layers", "lora_blocks", "use_rslora", "use_dora", "adapter_type",
    "lokr_factor", "lokr_decompose_both", "rank_pattern", "alpha_pattern", "cfg_dropout", "timestep_mu",
    "timestep_sigma", "timestep_distribution", "timestep_mix", "timestep_steps", "timestep_shift", "stratified_timesteps",
    "antithetic_noise", "weighting_scheme", "snr_gamma", "seed", "effective_batch_size",
    "num_updates", "optimizer",
    "learning_rate", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power", "adam_beta1", "adam_beta2",
    "adam_weight_decay", "adam_epsilon", "max_grad_norm", "mixed_precision", "max_duration_s", "base_quantization",
    "trigger_word", "trigger_position", "tag_shuffle", "caption_dropout", "ema_decay",
)  # fmt: skip


class HelpFormatter(argparse.HelpFormatter):
    """Shows the defaults that say something, and short names for values."""

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X", Path: "DIR"}.get(action.type, "NAME")

    def _get_help_string(self, action):
        says_something = action.default not in (None, False, argparse.SUPPRESS) and action.option_strings
        return f"{action.help} (default: %(default)s)" if says_something else action.help


def parse_args(input_args=None) -> argparse.Namespace:
    """The command line; a preset and a LoRA config set defaults, so that a flag always wins."""
    # fmt: off
    p = argparse.ArgumentParser(
        description="Train a LoRA for ACE-Step 1.5. Start with --preset smoke to see that everything works here, then "
        "--preset c. Defaults below are without a preset.", usage="accelerate launch train_ace_step_lora.py [--preset NAME] [--flag VALUE ...]",
        formatter_class=HelpFormatter, allow_abbrev=False)
    p.add_argument("--preset", choices=preset_names(), help="set of defaults: c (the reference recipe), loo (leave-one-out), smoke (five updates)")
    p.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    g = p.add_argument_group("model")
    g.add_argument("--pretrained_model_name_or_path", help="tiny, a folder (diffusers or original layout) or a Hub id; unset: $ACESTEP_MODEL, else /model, else the published base checkpoint")
    g.add_argument("--variant_dir", help="which DiT of an original-layout checkpoint, e.g. acestep-v15-base")
    g.add_argument("--revision", help="branch, tag or commit on the Hub")
    g.add_argument("--cache_dir", help="where the Hub's downloads are kept")
    g = p.add_argument_group("data")
    g.add_argument("--train_data_dir", help="folder of audio with sidecars, or a datasets directory; unset: $ACESTEP_DATA, else /data, else ./data")
    g.add_argument("--dataset_name", help="instead of a folder, a dataset on the Hub")
    g.add_argument("--max_train_samples", type=int, help="use only N tracks, drawn by --seed")
    g.add_argument("--trigger_word", metavar="WORD", help="a made-up word put into every track's tags, which calls the style up in prompts; a track's own (trigger_word or custom_tag in its sidecar) wins")
    g.add_argument("--trigger_position", default="prepend", help="where it goes: prepend (first), append (last) or replace (instead of the tags)")
    g.add_argument("--tag_shuffle", type=int, default=1, help="tell items their tags in one of N orders, the given one among them; N times the conditions to encode and keep (0.4 MB for 100 tokens); captions in sentences stay as they are")
    g.add_argument("--caption_dropout", type=float, default=0.0, help="probability of leaving an item's tags out, so that the trigger word (kept, as are lyrics, BPM and key) has to stand for them; one more condition a text; not guidance's --cfg_dropout, which drops all")
    g.add_argument("--min_duration_s", type=float, default=10.0, help="skip shorter tracks (the model makes 10 to 600 s)")
    g.add_argument("--max_duration_s", type=float, default=240.0, help="train on windows of at most this; those of a longer track cover it evenly and take turns")
    g.add_argument("--strict", action=argparse.BooleanOptionalAction, default=False, help="stop if any track has to be skipped")
    g.add_argument("--latent_cache_dir", type=Path, help="where latents and conditions are kept for the next run; unset: latents in $ACESTEP_CACHE_DIR or ~/.cache/acestep-lora")
    g.add_argument("--dataloader_num_workers", type=int, default=1, help="threads that read the cache ahead of the training; 0: none")
    g = p.add_argument_group("adapter")
    g.add_argument("--lora_config", help="JSON file with r, lora_alpha, lora_dropout, target_modules, layers_to_transform, use_rslora, use_dora, adapter_type, lokr_factor, lokr_decompose_both, rank_pattern, alpha_pattern (layer name: value); unset: $LORA_CONFIG")
    g.add_argument("--adapter_type", type=str.lower, default="lora", help="lora if unsure: it loads everywhere; lokr: a Kronecker product, a few per cent of its size")
    g.add_argument("--rank", type=int, default=64, help="rank of the update")
    g.add_argument("--lora_alpha", type=float, default=128.0, help="the update is scaled by alpha / rank")
    g.add_argument("--lora_dropout", type=float, default=0.0, help="dropout on the adapter's input; for lokr on the rows of the update")
    g.add_argument("--lora_layers", default="attention", help="attention, self, cross, mlp, joined by + (attention+mlp), or names of modules, comma-separated (to_q, q_proj or linear_q)")
    g.add_argument("--lora_blocks", help="adapt only these transformer blocks, such as 0-11,20; unset: all")
    g.add_argument("--use_rslora", action=argparse.BooleanOptionalAction, default=False, help="scale by alpha / sqrt(rank): for high ranks")
    g.add_argument("--use_dora", action=argparse.BooleanOptionalAction, default=False, help="weight-decomposed LoRA: trains the weights' norms too; slower, closer to full training at low rank")
    g.add_argument("--lokr_factor", type=int, default=-1, help="width of a lokr's first factor; -1: about the square root of the layer's, the smallest adapter; 8 or 16 for larger ones")
    g.add_argument("--lokr_decompose_both", action=argparse.BooleanOptionalAction, default=False, help="a lokr's first factor is of rank --rank, too")
    g = p.add_argument_group("objective")
    g.add_argument("--cfg_dropout", type=float, help="probability of training an item without its condition; unset: 0.15 for base and sft, 0 for turbo")
    g.add_argument("--timestep_distribution", choices=(*TIMESTEP_COMPONENTS, "mix"), default="logit_normal_max", help="logit_normal_max: as the model was trained; discrete: only the timesteps of inference, what the official trainer does for turbo; uniform; mix: shares of these")
    g.add_argument("--timestep_mix", default="logit_normal_max=0.5,discrete=0.5", help="the shares of mix")
    g.add_argument("--timestep_steps", type=int, help="inference steps that make up discrete; unset: 50, turbo 8")
    g.add_argument("--timestep_shift", type=float, help="and their shift; unset: 1, turbo 3")
    g.add_argument("--timestep_mu", type=float, help="mean of the timestep's normal, in logits; unset: the checkpoint's, else -0.4")
    g.add_argument("--timestep_sigma", type=float, help="its standard deviation; unset: the checkpoint's, else 1.0")
    g.add_argument("--stratified_timesteps", action=argparse.BooleanOptionalAction, default=False, help="spread the timesteps of an update's windows evenly over their distribution")
    g.add_argument("--antithetic_noise", action=argparse.BooleanOptionalAction, default=False, help="two items of an update share their noise with opposite signs")
    g.add_argument("--weighting_scheme", choices=WEIGHTING_SCHEMES, default="none", help="weights of the error by timestep, of mean 1; none: plain MSE; min_snr: the clean half up, both ends down; truncated_snr: both ends up; cosmap: the middle up; sigma_sqrt: the clean end up, steeply")
    g.add_argument("--snr_gamma", type=float, default=5.0, help="gamma of min_snr")
    g = p.add_argument_group("training")
    g.add_argument("--seed", type=int, default=42, help="same seed, data and hardware: same adapter")
    g.add_argument("--effective_batch_size", type=int, help="windows in an update, over all processes; divided into the largest forward passes that fit into memory (unset: what the next two make)")
    g.add_argument("--train_batch_size", type=int, help="at most N windows in one forward pass on each process (unset: as many as fit, or 1 without --effective_batch_size)")
    g.add_argument("--gradient_accumulation_steps", type=int, help="forward passes in one update; an update is then N × --train_batch_size × processes (unset: as many as it takes)")
    g.add_argument("--num_train_epochs", type=int, default=100, help="an epoch visits every track once, or as often as its repeats say; sampling weights (--balance) share these visits out otherwise")
    g.add_argument("--max_train_steps", type=int, help="optimizer updates; overrides the epochs")
    g.add_argument("--optimizer", type=str.lower, default="adamw", help="adamw if unsure; adamw_8bit and paged_adamw_8bit: a quarter of its memory ([8bit]); prodigy: finds the rate itself ([prodigy]); schedulefree_adamw: averages instead of a decaying schedule ([schedulefree])")
    g.add_argument("--use_8bit_adam", action=argparse.BooleanOptionalAction, default=False, help="diffusers' spelling of --optimizer adamw_8bit")
    g.add_argument("--learning_rate", type=float, default=DEFAULT_LEARNING_RATE, help="peak learning rate; with prodigy a factor on its estimate, 1 unless given here")
    g.add_argument("--lr_scheduler", default="constant_with_warmup", help="linear, cosine, cosine_with_restarts, polynomial, constant or constant_with_warmup; schedulefree_adamw takes the constant ones")
    g.add_argument("--lr_warmup_steps", type=int, help="updates of linear warm-up; unset: 5%% of all, at most 100")
    g.add_argument("--lr_num_cycles", type=int, default=1, help="restarts of cosine_with_restarts")
    g.add_argument("--lr_power", type=float, default=1.0, help="power of polynomial")
    g.add_argument("--adam_beta1", type=float, default=0.9, help="decay of the gradient's mean")
    g.add_argument("--adam_beta2", type=float, default=0.999, help="decay of its square's mean")
    g.add_argument("--adam_weight_decay", type=float, default=1e-2, help="decoupled weight decay")
    g.add_argument("--adam_epsilon", type=float, default=1e-8, help="added to the denominator")
    g.add_argument("--max_grad_norm", type=float, default=1.0, help="clip the gradient's norm to this")
    g.add_argument("--on_nan", choices=("stop", "skip"), default="stop", help="an update with a NaN or infinite loss or gradient is left out and named; stop: three in a row end the run, skip: they don't")
    g.add_argument("--ema_decay", type=float, help="average the adapter over the updates with this decay, e.g. 0.999 (less at first), and save the average; unset: don't")
    g.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="bf16", help="bf16 becomes fp32 where the hardware would be slower with it")
    g.add_argument("--allow_tf32", action=argparse.BooleanOptionalAction, default=True, help="TF32 matrix products on CUDA")
    g = p.add_argument_group("memory")
    g.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=False, help="compute activations again instead of keeping them: far less memory, about a third slower")
    g.add_argument("--gradient_checkpointing_ratio", type=float, default=1.0, help="do so in this share of the blocks only: more memory, less time")
    g.add_argument("--base_quantization", choices=tuple(QUANTIZATION_PACKAGES), default="none", help="keep the frozen base in 4 bits (nf4) or 8 (int8; fp8 is coarser); the adapter is an ordinary one [quantization]")
    g = p.add_argument_group("validation (the loss on held-out tracks: those of a dataset's split 'test', or those named here)")
    g.add_argument("--validation_data_dir", help="hold out the tracks of this folder or dataset (of its split test, where it has one)")
    g.add_argument("--validation_fraction", type=float, default=0.0, help="hold out this share of the tracks of --train_data_dir, the same of every genre")
    g.add_argument("--validation_seed", type=int, default=0, help="which tracks --validation_fraction holds out, and the noise and windows they are judged by: independent of --seed, so that runs compare")
    g.add_argument("--max_validation_samples", type=int, default=32, help="validate on at most N held-out tracks")
    g.add_argument("--num_validation_draws", type=int, default=8, help="forward passes of each held-out track, at fixed timesteps spread over those of training")
    g.add_argument("--validation_steps", type=int, help="validate every N updates, besides before the first and after the last; unset: about 20 times, less where that would cost more than a tenth of the training")
    g.add_argument("--validation_epochs", type=int, help="the same in epochs")
    g.add_argument("--early_stopping_patience", type=int, help="stop after N validations in a row without a lower loss; the adapter of the lowest is in best/")
    g = p.add_argument_group("output")
    g.add_argument("--output_dir", help="where the adapter goes; unset: output/<exp_name>")
    g.add_argument("--exp_name", help="unset: <preset>-<data folder>")
    g.add_argument("--overwrite_output_dir", action=argparse.BooleanOptionalAction, default=False, help="start over in a directory that holds a run")
    g.add_argument("--checkpointing_steps", "--every_n_train_steps", type=int, help="a checkpoint every N updates, and always one at the end; unset: 500, or none with --checkpointing_epochs")
    g.add_argument("--checkpointing_epochs", type=int, help="a checkpoint every N epochs")
    g.add_argument("--checkpoints_total_limit", type=int, default=3, help="keep only the newest N checkpoints")
    g.add_argument("--resume_from_checkpoint", help="latest (the newest one that is whole), or a checkpoint folder")
    g.add_argument("--report_to", default="none", help="tensorboard, wandb, trackio, or none; metrics.jsonl is always written")
    g.add_argument("--logging_dir", default="logs", help="the tracker's folder, inside the output directory")
    g.add_argument("--num_validation_samples", type=int, default=1, help="clips generated with and without the adapter at the end; 0: none")
    g.add_argument("--validation_prompt", help="their prompt, with the trigger word if it lacks it; unset: the tags, lyrics and key of the first tracks")
    g.add_argument("--validation_duration_s", type=float, default=30.0, help="their length")
    g.add_argument("--validation_inference_steps", type=int, help="their denoising steps; unset: 50, turbo 8")
    # fmt: on
    p.set_defaults(rank_pattern={}, alpha_pattern={})  # from a --lora_config alone
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset")
    early.add_argument("--lora_config")
    for name in ("--optimizer", "--effective_batch_size", "--train_batch_size", "--gradient_accumulation_steps"):
        early.add_argument(name)
    chosen, _ = early.parse_known_args(input_args)
    preset = load_preset(chosen.preset) if chosen.preset in preset_names() else {}
    larger = (chosen.train_batch_size or "").isdecimal() and int(chosen.train_batch_size) > preset.get(
        "effective_batch_size", 0
    )
    if (chosen.gradient_accumulation_steps or larger) and not chosen.effective_batch_size:
        preset.pop("effective_batch_size", None)  # the flag says how large an update is, and wins
    p.set_defaults(**preset)
    own_rate = default_learning_rate(chosen.optimizer or preset.get("optimizer", ""))
    if own_rate and (chosen.optimizer or "learning_rate" not in preset):
        p.set_defaults(learning_rate=own_rate)
    lora_config = chosen.lora_config or os.environ.get("LORA_CONFIG")
    if lora_config:
        names = {"r": "rank", "target_modules": "lora_layers", "layers_to_transform": "lora_blocks"}
        values = read_lora_config(Path(lora_config))
        for name in ("target_modules", "layers_to_transform"):
            if name in values:
                values[name] = ",".join(map(str, values[name]))
        p.set_defaults(lora_config=lora_config, **{names.get(name, name): value for name, value in values.items()})
    args = p.parse_args(input_args)
    if args.use_8bit_adam:
        args.optimizer = choose_eight_bit(args.optimizer)
    if args.checkpointing_steps is None and args.checkpointing_epochs is None:
        args.checkpointing_steps = 500
    return args


def check_args(args: argparse.Namespace) -> None:
    """Refuse values that can't work, before anything is loaded; settle how an update is divided."""
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{name} must be a finite number, not {value}.")
    positive = ("rank", "lora_alpha", "effective_batch_size", "train_batch_size", "gradient_accumulation_steps",
                "num_train_epochs", "max_train_steps", "max_train_samples", "learning_rate", "max_grad_norm",
                "checkpointing_steps", "checkpointing_epochs", "checkpoints_total_limit", "timestep_sigma",
                "timestep_steps", "timestep_shift", "snr_gamma", "validation_duration_s",
                "validation_inference_steps", "lr_num_cycles", "adam_epsilon", "max_validation_samples", "num_validation_draws", "validation_steps",
                "validation_epochs", "early_stopping_patience")  # fmt: skip
    for name in positive:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UsageError(f"--{name} must be positive, not {value}.")
    for name in ("lr_warmup_steps", "num_validation_samples", "dataloader_num_workers", "min_duration_s", "lr_power",
                 "adam_weight_decay"):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < 0:
            raise UsageError(f"--{name} must not be negative, not {value}.")
    if args.cfg_dropout is not None and not 0 <= args.cfg_dropout <= 1:
        raise UsageError(f"--cfg_dropout must be in [0, 1], not {args.cfg_dropout}.")
    if not 0 < args.gradient_checkpointing_ratio <= 1:
        raise UsageError(
            f"--gradient_checkpointing_ratio must be in (0, 1], not {args.gradient_checkpointing_ratio}; "
            "--no-gradient_checkpointing turns it off."
        )
    if args.ema_decay is not None and not 0 < args.ema_decay < 1:
        raise UsageError(f"--ema_decay must be between 0 and 1, not {args.ema_decay}.")
    if args.ema_decay is not None and args.optimizer.startswith("schedulefree"):
        raise UsageError(f"--optimizer {args.optimizer} averages the adapter itself; leave --ema_decay out.")
    for name in ("lora_dropout", "adam_beta1", "adam_beta2", "validation_fraction"):
        if not 0 <= getattr(args, name) < 1:
            raise UsageError(f"--{name} must be in [0, 1), not {getattr(args, name)}.")
    if args.validation_steps and args.validation_epochs:
        raise UsageError(
            "--validation_steps and --validation_epochs both say how often to validate; give one of them."
        )
    if args.validation_fraction and args.validation_data_dir:
        raise UsageError("--validation_fraction and --validation_data_dir both hold tracks out; give one of them.")
    if not 0 <= args.seed < 2**63:
        raise UsageError(f"--seed must be in [0, 2**63), not {args.seed}.")
    if not 2 <= args.max_duration_s <= 600:
        raise UsageError(f"--max_duration_s must be in [2, 600], the model's range, not {args.max_duration_s}.")
    if args.validation_duration_s > 600:
        raise UsageError(f"--validation_duration_s must be at most 600, not {args.validation_duration_s}.")
    if args.lr_scheduler not in LR_SCHEDULERS:
        raise UsageError(f"--lr_scheduler must be one of {', '.join(LR_SCHEDULERS)}, not {args.lr_scheduler!r}.")
    lora_settings(args)
    if args.adapter_type == "lokr" and args.base_quantization != "none":
        raise UsageError("--adapter_type lokr needs the base unquantised; leave --base_quantization out, or use lora.")
    check_optimizer(args.optimizer, lr_scheduler=args.lr_scheduler)
    check_quantization_installed(args.base_quantization)
    text_options(args)
    check_objective(args.timestep_distribution, args.timestep_mix, args.weighting_scheme)
    check_trackers(args.report_to)
    check_launch()
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    size = choose_batch_size(
        effective_batch_size=args.effective_batch_size,
        train_batch_size=args.train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        num_processes=num_processes,
    )
    args.effective_batch_size, args.train_batch_size = size.effective, size.micro
    args.gradient_accumulation_steps = -(-size.effective // (size.micro * num_processes))


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
    args.pretrained_model_name_or_path, model_from = default_model(args.pretrained_model_name_or_path)
    data = args.dataset_name
    data_from = "--dataset_name"
    if data is not None and args.train_data_dir is not None:
        raise UsageError("--dataset_name and --train_data_dir name two sources of data; give one of them.")
    if data is None:
        args.train_data_dir, data_from = default_data(args.train_data_dir)
        data = args.train_data_dir
    output_from = "--output_dir" if args.output_dir else "from --exp_name" if args.exp_name else "from preset and data"
    if args.exp_name is None:
        args.exp_name = "-".join(filter(None, (args.preset, Path(data).resolve().name)))
    args.output_dir = Path(args.output_dir).expanduser() if args.output_dir else Path("output") / args.exp_name
    return {
        "Preset": args.preset or "none",
        "Model": f"{args.pretrained_model_name_or_path}  ({model_from})",
        "Data": f"{data}  ({data_from})",
        "Output": f"{args.output_dir}  ({output_from})",
        "Optimizer": describe_optimizer(args.optimizer, learning_rate=args.learning_rate),
    }


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

    for name in ("validation_steps", "validation_epochs", "early_stopping_patience"):
        if getattr(args, name) and not num_held_out:
            raise UsageError(
                f"--{name} needs held-out tracks: --validation_fraction 0.1 holds a tenth of the tracks out, "
                "--validation_data_dir names others."
            )
    if args.validation_epochs:
        return args.validation_epochs * updates_per_epoch
    return args.validation_steps or default_validation_steps(
        args.num_updates, items_per_update=items_per_update, num_passes=num_held_out * args.num_validation_draws
    )


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
    settings = {name: getattr(args, name) for name in RESUME_SETTINGS}
    if held_out:
        names = (
            "num_validation_draws",
            "validation_seed",
            "validation_steps",
            "validation_epochs",
            "early_stopping_patience",
        )
        settings |= {"held_out": held_out, **{name: getattr(args, name) for name in names}}
    if args.lr_scheduler.startswith("constant"):
        settings["num_updates"] = None
    return settings


def describe_run(
    args: argparse.Namespace, facts: dict, *, num_tracks: int, training_s: float
) -> list[tuple[str, str]]:
    """The rows of the model card's table."""
    model = f"`{args.pretrained_model_name_or_path}`" + (f", `{args.variant_dir}`" if args.variant_dir else "")
    return [
        ("base", f"{model} (SHA-256 of its DiT: `{facts['model_sha256'][:16]}…`)"),
        ("tracks", str(num_tracks)),
        describe_kind(facts["lora"]),
        (
            "targets",
            ", ".join(facts["lora"]["target_modules"])
            + (f" of blocks {args.lora_blocks}" if args.lora_blocks else ""),
        ),
        ("updates", f"{args.num_updates} of {args.effective_batch_size} windows"),
        ("optimizer", args.optimizer),
        ("learning rate", f"{args.learning_rate:g}, {args.lr_scheduler}, {args.lr_warmup_steps} updates of warm-up"),
        ("precision, seed", f"{args.mixed_precision}, {args.seed}"),
        ("quantised base", args.base_quantization),
        *_prompting_rows(facts),
        ("time", f"{training_s:.0f} s"),
    ]


def _prompting_rows(facts: dict) -> list[tuple[str, str]]:
    """How to call up what was trained: the trigger words and where they go in a prompt."""
    places = {
        "prepend": "put it first in the prompt",
        "append": "put it last in the prompt",
        "replace": "prompt with it",
    }
    return [
        ("trigger word", f"`{use['trigger_word']}`: {places[use['trigger_position']]} ({use['tracks']} tracks)")
        for use in facts.get("trigger_words", ())[:20]
    ]
