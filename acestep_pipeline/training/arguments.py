"""The training script's command line: its arguments, and what presets and a LoRA config set of them.

Their values are checked in `argument_checks.py`; what they come to is in `settings.py`.
"""

import argparse
import os
from pathlib import Path

from ..adapters.settings import read_lora_config
from ..command_line import accept_either_dash, flags_of, refuse_unknown
from ..container.variables import TRAINING
from ..presets import load_preset, preset_names
from .memory import QUANTIZATION_PACKAGES
from .objective import TIMESTEP_COMPONENTS, WEIGHTING_SCHEMES
from .optimizers import DEFAULT_LEARNING_RATE, choose_eight_bit, default_learning_rate


class HelpFormatter(argparse.HelpFormatter):
    """Shows the defaults that say something, and short names for values."""

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X", Path: "DIR"}.get(action.type, "NAME")

    def _get_help_string(self, action):
        says_something = action.default not in (None, False, argparse.SUPPRESS) and action.option_strings
        return f"{action.help} (default: %(default)s)" if says_something else action.help


# One line an argument.
# fmt: off


def _add_model_arguments(g) -> None:
    g.add_argument("--pretrained_model_name_or_path", help="tiny, or a folder, s3://…, hf://… or Hub id (diffusers or original layout); unset: $ACESTEP_MODEL, else /model, else the published base checkpoint (with an xl_ preset XL's)")
    g.add_argument("--variant_dir", help="which DiT of an original-layout checkpoint, e.g. acestep-v15-base")
    g.add_argument("--revision", help="branch, tag or commit on the Hub")
    g.add_argument("--cache_dir", help="where the Hub's downloads are kept")


def _add_data_arguments(g) -> None:
    g.add_argument("--train_data_dir", help="folder of audio with sidecars, or a datasets directory, also s3://… or hf://datasets/user/name; unset: $ACESTEP_DATA, else /data, else ./data")
    g.add_argument("--streaming", action=argparse.BooleanOptionalAction, default=False, help="of a folder of audio or a dataset at s3://… or hf://… fetch each file when it is to be encoded, and keep its latents alone: for music that is larger than the disk; the adapter is the same")
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


def _add_adapter_arguments(g) -> None:
    g.add_argument("--lora_config", help="JSON file, also s3://… or hf://…, with r, lora_alpha, lora_dropout, target_modules, layers_to_transform, use_rslora, use_dora, adapter_type, lokr_factor, lokr_decompose_both, rank_pattern, alpha_pattern (layer name: value); unset: $LORA_CONFIG")
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


def _add_objective_arguments(g) -> None:
    g.add_argument("--cfg_dropout", type=float, help="probability of training an item without its condition; unset: 0.15 for base and sft, 0 for turbo")
    g.add_argument("--timestep_distribution", choices=(*TIMESTEP_COMPONENTS, "mix"), default="logit_normal_max", help="logit_normal_max: as the model was trained; discrete: only the timesteps of inference, what the official trainer does for turbo; uniform; mix: shares of these")
    g.add_argument("--timestep_mix", help="the shares of mix (default: logit_normal_max=0.5,discrete=0.5)")
    g.add_argument("--timestep_steps", type=int, help="inference steps that make up discrete; unset: 50, turbo 8")
    g.add_argument("--timestep_shift", type=float, help="and their shift; unset: 1, turbo 3")
    g.add_argument("--timestep_mu", type=float, help="mean of the timestep's normal, in logits; unset: the checkpoint's, else -0.4")
    g.add_argument("--timestep_sigma", type=float, help="its standard deviation; unset: the checkpoint's, else 1.0")
    g.add_argument("--stratified_timesteps", action=argparse.BooleanOptionalAction, default=False, help="spread the timesteps of an update's windows evenly over their distribution: the loss of 4-window updates varies 11 %% less; of their gradient no gain was measured")
    g.add_argument("--antithetic_noise", action=argparse.BooleanOptionalAction, default=False, help="two items of an update share their noise with opposite signs; alone it gained nothing measurable")
    g.add_argument("--weighting_scheme", choices=WEIGHTING_SCHEMES, default="none", help="weights of the error by timestep, of mean 1; none: plain MSE; min_snr: the clean half up, both ends down; truncated_snr: both ends up; cosmap: the middle up; sigma_sqrt: the clean end up, steeply")
    g.add_argument("--snr_gamma", type=float, help="gamma of min_snr (default: 5)")


def _add_training_arguments(g) -> None:
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
    g.add_argument("--torch_compile", action=argparse.BooleanOptionalAction, default=False, help="compile the DiT's blocks for the commonest shapes of forward passes, a minute or so for each before the first update; conditions are padded to a few lengths. Their gradients are compared with plain blocks' first")
    g.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="bf16", help="bf16 becomes fp32 where the hardware would be slower with it")
    g.add_argument("--allow_tf32", action=argparse.BooleanOptionalAction, default=True, help="TF32 matrix products on CUDA")


def _add_memory_arguments(g) -> None:
    g.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=False, help="compute activations again instead of keeping them: far less memory, about a third slower")
    g.add_argument("--gradient_checkpointing_ratio", type=float, default=1.0, help="do so in this share of the blocks only: more memory, less time")
    g.add_argument("--base_quantization", choices=tuple(QUANTIZATION_PACKAGES), default="none", help="keep the frozen base in 4 bits (nf4) or 8 (int8; fp8 is coarser); the adapter is an ordinary one [quantization]")
    g.add_argument("--offload", action=argparse.BooleanOptionalAction, default=False, help="keep the frozen base in the host's memory, two blocks of it at a time on the GPU: the same adapter, slower where an update is quicker than the transfer (acestep-lora estimate says so)")


def _add_validation_arguments(g) -> None:
    g.add_argument("--validation_data_dir", help="hold out the tracks of this folder or dataset (of its split test, where it has one), also s3://… or hf://…")
    g.add_argument("--validation_fraction", type=float, default=0.0, help="hold out this share of the tracks of --train_data_dir, the same of every genre")
    g.add_argument("--validation_seed", type=int, default=0, help="which tracks --validation_fraction holds out, and the noise and windows they are judged by: independent of --seed, so that runs compare")
    g.add_argument("--max_validation_samples", type=int, default=32, help="validate on at most N held-out tracks, and at the end measure the effect on at most as many training tracks")
    g.add_argument("--num_validation_draws", type=int, default=8, help="forward passes of each of these tracks, at fixed timesteps spread over those of training")
    g.add_argument("--validation_steps", type=int, help="validate every N updates, besides before the first and after the last; unset: about 20 times, less where that would cost more than a tenth of the training")
    g.add_argument("--validation_epochs", type=int, help="the same in epochs")
    g.add_argument("--early_stopping_patience", type=int, help="stop after N validations in a row without a lower loss; the adapter of the lowest is in best/")


def _add_output_arguments(g) -> None:
    g.add_argument("--output_dir", help="where the adapter goes; unset: output/<exp_name>; s3://bucket/… or hf://user/name: a folder in the cache, published there as with --push_to_s3 or --push_to_hub")
    g.add_argument("--exp_name", help="unset: <preset>-<data folder>")
    g.add_argument("--overwrite_output_dir", action=argparse.BooleanOptionalAction, default=False, help="start over in a directory that holds a run")
    g.add_argument("--checkpointing_steps", "--every_n_train_steps", type=int, help="a checkpoint every N updates, and always one at the end; unset: 500, or none with --checkpointing_epochs")
    g.add_argument("--checkpointing_epochs", type=int, help="a checkpoint every N epochs")
    g.add_argument("--checkpoints_total_limit", type=int, default=3, help="keep only the newest N checkpoints")
    g.add_argument("--resume_from_checkpoint", help="latest (the newest one that is whole, here or where the run is published), a checkpoint folder, s3://…/latest or s3://…/checkpoint-<update>")
    g.add_argument("--push_to_s3", help="publish the checkpoints while training goes on, and the adapter at the end: my-adapter stands for lora/my-adapter below $ACESTEP_S3_ROOT; or s3://bucket/… [s3]")
    g.add_argument("--upload_timeout_s", type=float, default=3600.0, help="wait at most this long at the end for what is still being sent")
    g.add_argument("--report_to", default="none", help="tensorboard, wandb, trackio, or none; metrics.jsonl is always written")
    g.add_argument("--logging_dir", default="logs", help="the tracker's folder, inside the output directory")
    g.add_argument("--num_validation_samples", type=int, default=1, help="clips generated with and without the adapter at the end; 0: none")
    g.add_argument("--preview_steps", type=int, help="such clips with the adapter while it trains, too: before the first update and every N, in samples/preview-<update>/; each time a pipeline is loaded beside the training, which stays the same to the bit")
    g.add_argument("--validation_prompt", help="their prompt, with the trigger word if it lacks it; unset: the tags, lyrics and key of the first tracks")
    g.add_argument("--validation_duration_s", type=float, default=30.0, help="their length")
    g.add_argument("--validation_inference_steps", type=int, help="their denoising steps; unset: 50, turbo 8")
    g.add_argument("--license", metavar="ID", help="the licence that you give the adapter, as the Hub spells it (cc-by-4.0, mit, …), for the model card")
    g.add_argument("--push_to_hub", action=argparse.BooleanOptionalAction, default=False, help="publish the adapter on the Hub at the end: one commit of weights, settings, metrics, card, samples and pictures, never of checkpoints; the token is HF_TOKEN's or `hf auth login`'s, and is tried before anything is loaded")
    g.add_argument("--hub_model_id", metavar="USER/NAME", help="where; unset: <exp_name>, yours")
    g.add_argument("--hub_private_repo", action=argparse.BooleanOptionalAction, default=False, help="make that repository private")
    g.add_argument("--hub_tag", metavar="TAG", help="tag the commit, e.g. v1")
    g.add_argument("--style_distance", type=int, nargs="?", const=16, metavar="N", help="measure how far N clips (16; at least 8), generated with and without the adapter, are from the training music in sound: a Frechet distance over MFCCs; costs 2 N generations [style-distance]")


# fmt: on


def build_parser() -> argparse.ArgumentParser:
    """All arguments, with their defaults without a preset."""
    p = argparse.ArgumentParser(
        description="Train a LoRA for ACE-Step 1.5. Start with --preset smoke to see that everything works here, then "
        "--preset c. Defaults below are without a preset. On several GPUs: accelerate launch --config_file "
        "examples/accelerate_configs/ddp.yaml, fsdp2.yaml (a share of the model on each) or deepspeed_zero2.yaml "
        "(--optimizer adamw).",
        usage="accelerate launch train_ace_step_lora.py [--preset NAME] [--flag VALUE ...]",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "--preset",
        choices=preset_names(),
        help="set of defaults: c (the reference recipe), loo (leave-one-out), smoke (five updates)",
    )
    p.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    _add_model_arguments(p.add_argument_group("model"))
    _add_data_arguments(p.add_argument_group("data"))
    _add_adapter_arguments(p.add_argument_group("adapter"))
    _add_objective_arguments(p.add_argument_group("objective"))
    _add_training_arguments(p.add_argument_group("training"))
    _add_memory_arguments(p.add_argument_group("memory"))
    _add_validation_arguments(
        p.add_argument_group(
            "validation (the loss on held-out tracks: those of a dataset's split 'test', or those named here)"
        )
    )
    _add_output_arguments(p.add_argument_group("output"))
    p.set_defaults(rank_pattern={}, alpha_pattern={})  # from a --lora_config alone
    for variable in TRAINING:
        p._option_string_actions[f"--{variable.flag}"].help += f" [container: {variable.name}]"
    accept_either_dash(p)
    return p


def parse_args(input_args=None) -> argparse.Namespace:
    """The command line; a preset and a LoRA config set defaults, so that a flag always wins."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in (
        "--preset",
        "--lora_config",
        "--optimizer",
        "--effective_batch_size",
        "--train_batch_size",
        "--gradient_accumulation_steps",
    ):
        early.add_argument(name)
    accept_either_dash(early)
    chosen, _ = early.parse_known_args(input_args)
    parser = build_parser()
    parser.set_defaults(**(_preset_defaults(chosen) | _lora_config_defaults(chosen)))
    args, unknown = parser.parse_known_args(input_args)
    if unknown:
        refuse_unknown(parser, unknown, flags_of(parser))
    if args.use_8bit_adam:
        args.optimizer = choose_eight_bit(args.optimizer)
    if args.checkpointing_steps is None and args.checkpointing_epochs is None:
        args.checkpointing_steps = 500
    return args


def _preset_defaults(chosen: argparse.Namespace) -> dict:
    """What the preset sets, but for what the flags in `chosen` say in other words."""
    preset = load_preset(chosen.preset) if chosen.preset in preset_names() else {}
    larger = (chosen.train_batch_size or "").isdecimal() and int(chosen.train_batch_size) > preset.get(
        "effective_batch_size", 0
    )
    if (chosen.gradient_accumulation_steps or larger) and not chosen.effective_batch_size:
        preset.pop("effective_batch_size", None)  # the flag says how large an update is, and wins
    own_rate = default_learning_rate(chosen.optimizer or preset.get("optimizer", ""))
    if own_rate and (chosen.optimizer or "learning_rate" not in preset):
        preset["learning_rate"] = own_rate
    return preset


def _lora_config_defaults(chosen: argparse.Namespace) -> dict:
    """What the JSON file of --lora_config or $LORA_CONFIG sets, under the names of the arguments."""
    path = chosen.lora_config or os.environ.get("LORA_CONFIG")
    if not path:
        return {}
    names = {"r": "rank", "target_modules": "lora_layers", "layers_to_transform": "lora_blocks"}
    values = read_lora_config(path)
    for name in ("target_modules", "layers_to_transform"):
        if name in values:
            values[name] = ",".join(map(str, values[name]))
    return {"lora_config": path} | {names.get(name, name): value for name, value in values.items()}
