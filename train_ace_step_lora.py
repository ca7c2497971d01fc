#!/usr/bin/env python
"""Train a LoRA for ACE-Step 1.5 on a folder of music.

    accelerate launch train_ace_step_lora.py --preset c

This file is the training loop; what it is made of is in `acestep_pipeline/`. The command line is in
`acestep_pipeline/training/arguments.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from acestep_pipeline.errors import one_sentence_errors
from acestep_pipeline.paths import LORA_WEIGHTS_NAME, cache_dir
from acestep_pipeline.training import arguments, settings
from acestep_pipeline.training.completion import finish, publish
from acestep_pipeline.training.directory_lock import hold_directory
from acestep_pipeline.training.preflight import check_run
from acestep_pipeline.training.run_directory import (
    clear_leftovers,
    clear_run,
    describe_checkpoint,
    naming_failed_writes,
    nothing_left_to_do,
)
from acestep_pipeline.training.uploading import STOP_GRACE_S, Uploads

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from acestep_pipeline.data.batching import BatchLoader, EpochPlanner
    from acestep_pipeline.training.comparison import Measured
    from acestep_pipeline.training.interruption import Interruption
    from acestep_pipeline.training.learner import Learner
    from acestep_pipeline.training.parallelism import Parallelism
    from acestep_pipeline.training.previews import Previewer
    from acestep_pipeline.training.records import Records
    from acestep_pipeline.training.setup import TrainingInputs
    from acestep_pipeline.training.validator import Validator


def train(args: argparse.Namespace) -> None:
    """The whole run: accelerator → models and data → optimizer → validation → resume → the loop → save → report."""
    command = dict(vars(args))
    sources, checkpoint, uploads = check_run(args)
    if args.resume_from_checkpoint == "latest" and checkpoint and nothing_left_to_do(args.output_dir, command):
        return publish(args)

    from acestep_pipeline.training.final_report import write_final_report
    from acestep_pipeline.training.interruption import Interruption, interrupted
    from acestep_pipeline.training.parallelism import choose_parallelism
    from acestep_pipeline.training.previews import Previewer
    from acestep_pipeline.training.run_costs import cost_rows

    accelerator = start(args, sources, checkpoint)
    say, main = accelerator.print, accelerator.is_main_process
    inputs = load_inputs(args, accelerator)
    parallel = choose_parallelism(accelerator, max_grad_norm=args.max_grad_norm)
    planner = plan_updates(args, inputs, parallel)
    learner = build_learner(args, inputs, parallel, checkpoint)
    validator = build_validator(args, inputs, planner, learner)
    listening = choose_listening(args, accelerator, inputs)
    previewer = Previewer(args.output_dir, steps=args.preview_steps if main else None, **listening)
    state = {**learner.state(), "planner": planner, "validator": validator}
    _held = hold_directory(args.output_dir) if main else None  # until the end, against a second run there
    done, records = resume(args, accelerator, inputs, state, checkpoint, uploads)

    interruption = Interruption()  # from here SIGTERM and SIGINT wait for the end of an update
    done, stop = loop(args, inputs, planner, learner, validator, previewer, records, interruption, done=done)
    training_s = records.close() if main else 0.0
    validator.close()
    measured = None if stop else save(args, inputs, planner, learner, validator)
    if stop and (not_sent := uploads.finish(STOP_GRACE_S)):
        say(f"warning: {not_sent}")
    accelerator.wait_for_everyone()

    tracks, facts, dataset = inputs.tracks, inputs.facts, inputs.dataset
    compiled = inputs.compiled.rows() if inputs.compiled else []
    # Before the process group ends: a DDP model that outlives it waits in its destructor for the group's threads,
    # which wait for the interpreter. And the report loads a model of its own.
    del inputs, learner, validator, state, records
    accelerator.free_memory()
    accelerator.end_training()
    interruption.release()
    if stop:
        raise interrupted(stop, done=done, num_updates=args.num_updates, output_dir=args.output_dir)
    if not main:
        return
    say(f"\nTrained {done} updates in {training_s:.0f} s.")
    for name, value in compiled:
        say(f"{name.capitalize()}: {value}.")
    costs = cost_rows(accelerator.device, num_processes=accelerator.num_processes, training_s=training_s)
    print(
        write_final_report(
            args.output_dir,
            name=args.exp_name,
            example_prompt=tracks[0].windows[0].fields.prompt,
            about=settings.describe_run(args, facts, dataset=dataset, costs=costs + compiled),
            measured=measured,
            tracks=tracks,
            style_clips=args.style_distance,
            duration_s=args.validation_duration_s,
            **{**listening, "prompts": listening["prompts"][: args.num_validation_samples]},
        )
    )
    finish(args, command, uploads)


def start(args: argparse.Namespace, sources: dict[str, str], checkpoint: Path | None) -> Accelerator:
    """The accelerator, after saying what is trained on, on what, and in which precision."""
    from acestep_pipeline.hardware import describe_device
    from acestep_pipeline.training import setup
    from acestep_pipeline.training.processes import check_same_everywhere

    accelerator = setup.build_accelerator(
        mixed_precision=args.mixed_precision,
        report_to=args.report_to,
        output_dir=args.output_dir,
        logging_dir=args.logging_dir,
        allow_tf32=args.allow_tf32,
    )
    say, device, precision = accelerator.print, accelerator.device, accelerator.mixed_precision
    facts = {
        "Device": describe_device(device),
        "Precision": str(setup.WEIGHT_DTYPES[precision]).removeprefix("torch."),
    }
    for name, value in {**sources, **facts}.items():
        say(f"{name + ':':<11}{value}")
    if precision != args.mixed_precision:
        say(f"warning: this {device.type} has no fast {args.mixed_precision} and would be slower with it: using fp32.")
        args.mixed_precision = precision
    if args.resume_from_checkpoint is not None:
        check_same_everywhere({"the checkpoint to resume from": describe_checkpoint(checkpoint)})
    return accelerator


def load_inputs(args: argparse.Namespace, accelerator: Accelerator) -> TrainingInputs:
    """The model with its adapter, and the tracks; what the flags leave to the model is filled in."""
    from acestep_pipeline.checkpoint_source import open_checkpoint
    from acestep_pipeline.training import setup
    from acestep_pipeline.training.fetching import fetch_meanwhile

    source = settings.checkpoint_source(args)
    inputs = setup.prepare_inputs(
        accelerator,
        checkpoint=source,
        latent_cache_dir=args.latent_cache_dir or cache_dir() / "latents",
        text=settings.text_options(args),
        lora=settings.lora_settings(args),
        gradient_checkpointing=args.gradient_checkpointing_ratio if args.gradient_checkpointing else 0.0,
        **settings.flags(
            args,
            *("train_data_dir", "dataset_name", "min_duration_s", "max_duration_s", "max_train_samples", "streaming"),
            *("validation_data_dir", "validation_fraction", "max_validation_samples", "validation_seed", "strict"),
            *("base_quantization", "offload", "torch_compile", "seed"),
        ),
    )
    settings.fill_model_defaults(args, inputs.transformer.config, is_turbo=inputs.is_turbo)
    listens = bool(args.num_validation_samples or args.style_distance) or args.preview_steps is not None
    if accelerator.is_main_process and listens and not inputs.encoders_used and open_checkpoint(**source).is_remote:
        accelerator.print("The rest of the checkpoint, which samples need, is fetched while the DiT trains.")
        fetch_meanwhile(source)
    return inputs


def plan_updates(args: argparse.Namespace, inputs: TrainingInputs, parallel: Parallelism) -> EpochPlanner:
    """Which items every update consists of; how many updates there are becomes `args.num_updates`."""
    from acestep_pipeline.data.batching import EpochPlanner

    planner = EpochPlanner(
        inputs.tracks,
        seed=args.seed,
        effective_batch_size=args.effective_batch_size,
        micro_batch_size=args.train_batch_size,
        num_processes=parallel.accelerator.num_processes,
        lock_step=parallel.lock_step,
    )
    args.num_updates = args.max_train_steps or args.num_train_epochs * planner.updates_per_epoch
    return planner


def build_learner(
    args: argparse.Namespace, inputs: TrainingInputs, parallel: Parallelism, checkpoint: Path | None
) -> Learner:
    """Optimizer, schedule, and the model as the processes share it."""
    from acestep_pipeline.training import checkpointing, optimization
    from acestep_pipeline.training.ema import AdapterAverage
    from acestep_pipeline.training.health import NanGuard
    from acestep_pipeline.training.learner import Learner

    accelerator = parallel.accelerator
    if args.lr_warmup_steps is None:
        begun_with = checkpoint and checkpointing.saved_setting(checkpoint, "lr_warmup_steps")
        args.lr_warmup_steps = (
            optimization.default_warmup_steps(args.num_updates) if begun_with is None else begun_with
        )
    optimizer = optimization.build_optimizer(
        inputs.lora_parameters,
        **settings.flags(args, "optimizer", "learning_rate"),
        **settings.flags(args, "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon"),
        warmup_steps=args.lr_warmup_steps if args.lr_scheduler == "constant_with_warmup" else 0,
        fused=accelerator.device.type == "cuda" and accelerator.scaler is None,
    )
    lr_scheduler = optimization.build_lr_scheduler(
        optimizer,
        **settings.flags(args, "num_updates", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power"),
    )
    # The schedule counts updates, not processes: it is stepped below, and not prepared.
    model, optimizer = parallel.prepare(inputs.transformer, optimizer)
    return Learner(
        parallel=parallel,
        transformer=inputs.transformer,
        model=model,
        parameters=inputs.lora_parameters,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        average=AdapterAverage(inputs.lora_parameters, args.ema_decay),
        nan_guard=NanGuard(stops=args.on_nan == "stop", scaler=accelerator.scaler),
    )


def build_validator(
    args: argparse.Namespace, inputs: TrainingInputs, planner: EpochPlanner, learner: Learner
) -> Validator:
    """What measures the loss on held-out tracks."""
    from acestep_pipeline.training.validation_loss import LossMeter
    from acestep_pipeline.training.validator import Validator

    meter = LossMeter(
        learner.accelerator,
        learner.model,
        error_of(inputs),
        config=inputs.transformer.config,
        num_draws=args.num_validation_draws,
        seed=args.validation_seed,
    )
    steps = settings.validation_steps(
        args,
        updates_per_epoch=planner.updates_per_epoch,
        items_per_update=planner.effective_batch_size,
        num_held_out=len(inputs.held_out),
    )
    return Validator(
        meter,
        inputs.held_out,
        output_dir=args.output_dir,
        steps=steps,
        patience=args.early_stopping_patience,
        log_to_tracker=args.report_to != "none",
    )


def choose_listening(args: argparse.Namespace, accelerator: Accelerator, inputs: TrainingInputs) -> dict:
    """What is generated with the adapter, and how: for previews and for the samples at the end."""
    from acestep_pipeline.training.memory import samples_one_by_one
    from acestep_pipeline.training.setup import WEIGHT_DTYPES
    from acestep_pipeline.training.validation import choose_prompts

    prompt = args.validation_prompt and settings.text_options(args).with_trigger(args.validation_prompt)
    return {
        "prompts": choose_prompts(
            [track.windows[0].fields for track in inputs.tracks],
            prompt=prompt,
            num_samples=max(1, args.num_validation_samples),
            duration_s=args.validation_duration_s,
        ),
        "checkpoint": settings.checkpoint_source(args),
        "device": accelerator.device,
        "weight_dtype": WEIGHT_DTYPES[accelerator.mixed_precision],
        "one_by_one": samples_one_by_one(args.base_quantization, offload=args.offload),
        "num_inference_steps": args.validation_inference_steps,
        "seed": args.seed,
    }


def resume(
    args: argparse.Namespace,
    accelerator: Accelerator,
    inputs: TrainingInputs,
    state: dict,
    checkpoint: Path | None,
    uploads: Uploads,
) -> tuple[int, Records | None]:
    """Restore `state` from a checkpoint, clear away what it makes void, and begin what the run writes.

    Returns:
        How many updates are done, and on the main process where the next ones are recorded.
    """
    from acestep_pipeline.training import checkpointing, tracking
    from acestep_pipeline.training.records import Records

    say, done, records = accelerator.print, 0, None
    identity = settings.resume_settings(args, held_out=[track.id for track in inputs.held_out]) | inputs.facts
    identity |= {"tracks": [track.id for track in inputs.tracks]}
    if checkpoint is not None:
        checkpointing.check_same_settings(checkpoint, identity)
        done = checkpointing.load_checkpoint(checkpoint, **state)
        say(f"Resuming from {checkpoint}: {done} of {args.num_updates} updates are done.")
        if change := state["planner"].describe_change():
            say(f"warning: {change}")
        if done == args.num_updates:
            say("All of them: only the adapter's file and the final report are made again.")
    elif args.resume_from_checkpoint is not None:
        say(f"There is no checkpoint in {args.output_dir} yet: starting from the beginning.")
    if accelerator.is_main_process:
        if args.overwrite_output_dir and checkpoint is None:
            clear_run(args.output_dir)
        for removed in clear_leftovers(args.output_dir, update=done):
            say(f"Removed {removed}: it lies beyond the update that is resumed from, and is made again.")
        if checkpoint is None:
            uploads.start_over()
        facts = inputs.facts | {"dataset": inputs.dataset}
        tracking.write_training_args(args.output_dir, arguments=vars(args), facts=facts)
        kept = {"settings": identity, "total_limit": args.checkpoints_total_limit, **state}
        save_checkpoint = functools.partial(checkpointing.save_checkpoint, args.output_dir, **kept)
        records = Records(args.output_dir, first_update=done, save_checkpoint=save_checkpoint, uploads=uploads)
    accelerator.wait_for_everyone()
    if args.report_to != "none":
        accelerator.init_trackers("ace-step-lora", config=tracking.plain_values(vars(args)))
    return done, records


def loop(
    args: argparse.Namespace,
    inputs: TrainingInputs,
    planner: EpochPlanner,
    learner: Learner,
    validator: Validator,
    previewer: Previewer,
    records: Records | None,
    interruption: Interruption,
    *,
    done: int,
) -> tuple[int, int]:
    """The updates after `done`, until all are done, a signal comes, or validation finds no more gain.

    Returns:
        How many are done, and the signal, or 0.
    """
    from acestep_pipeline.data.batching import BatchLoader
    from acestep_pipeline.progress import progress_bar
    from acestep_pipeline.training.batch_size import BatchSize
    from acestep_pipeline.training.checkpointing import is_due
    from acestep_pipeline.training.setup import describe_tracks

    accelerator, num_updates, per_epoch = learner.accelerator, args.num_updates, planner.updates_per_epoch
    batch_size = BatchSize(args.effective_batch_size, args.train_batch_size)
    accelerator.print(
        f"Training {sum(p.numel() for p in learner.parameters):,} parameters on "
        f"{describe_tracks(inputs.tracks, inputs.frames_per_second)}: {num_updates} updates, "
        f"{per_epoch} an epoch.\n{batch_size.describe(accelerator.num_processes)}."
    )
    draw = settings.draw_settings(args, items_per_update=planner.effective_batch_size)
    checkpoint_every = {"every_updates": args.checkpointing_steps, "every_epochs": args.checkpointing_epochs}
    on_gpu = accelerator.device.type == "cuda"
    loader = BatchLoader(inputs.tracks, draw, pin_memory=on_gpu, bucket_conditions=args.torch_compile)
    progress = progress_bar(total=num_updates, initial=done, desc="Training", unit="update", disable=not records)
    if done == 0:
        observe(validator, previewer, learner, update=0, num_updates=num_updates)
    stop = 0
    # Again from an update whose forward passes did not fit into memory.
    while done < num_updates and not stop and not validator.should_stop:
        if inputs.compiled:
            compile_passes(inputs, planner, learner, loader)
        plans, ahead = itertools.tee(planner.plans_from(done, num_updates))
        own_micro_batches = (micro for update in ahead for micro in update[accelerator.process_index])
        batches = loader.stream(own_micro_batches, num_workers=args.dataloader_num_workers)
        for update in plans:
            sums, losses = accumulate_gradients(args, inputs, learner, update, batches, done=done)
            (loss, misfits), stop = interruption.agree(accelerator, sums)
            if misfits:  # on any process: all of them divide the update anew
                stop = 0  # after the update, as ever: the signal is heard again
                frames = learner.give_way(planner, update)
                accelerator.print(
                    f"warning: update {done + 1} did not fit into memory; it is repeated, now with at most "
                    f"{frames / inputs.frames_per_second:g} s of music in a forward pass of several windows."
                )
                break
            done += 1
            line = learner.step(loss, losses, update=done, output_dir=args.output_dir)
            observe(validator, previewer, learner, update=done, num_updates=num_updates)
            progress.set_postfix(loss=f"{loss:.4f}", lr=f"{line['lr']:.2e}", refresh=False)
            progress.update()
            if args.report_to != "none":
                accelerator.log(line, step=done)
            if records:
                records.add_update(done, {"epoch": (done - 1) // per_epoch, **line})
            over = stop or done == num_updates or validator.should_stop
            # While updates are left out, the adapter may be what is wrong, and older checkpoints are worth keeping.
            if over or (is_due(done, per_epoch=per_epoch, **checkpoint_every) and not learner.nan_guard.in_a_row):
                learner.parallel.gather(learner.optimizer)  # of all processes, for the one that writes
                if records:
                    records.add_checkpoint(done)
            if over:
                break
        batches.close()
    progress.close()
    return done, stop


def accumulate_gradients(
    args: argparse.Namespace,
    inputs: TrainingInputs,
    learner: Learner,
    update: list,
    batches: Iterator[dict],
    *,
    done: int,
) -> tuple[torch.Tensor, list]:
    """The forward and backward passes of this process's part of an update.

    Returns:
        `[2]`, to be summed over processes: the loss, and 1 where memory ran out, else 0. And of each pass the tracks,
        their timesteps `[batch]`, and its loss.
    """
    import torch

    from acestep_pipeline.data.batching import keyed_seed

    accelerator, tracks = learner.accelerator, inputs.tracks
    device, rank = accelerator.device, accelerator.process_index
    # Dividing by the elements of the whole update, on every process, makes its loss one plain mean.
    items = [item for process in update for micro in process if micro.weight for item in micro.items]
    elements = inputs.silence_latent.shape[-1] * sum(tracks[item.track].crop_frames for item in items)
    update_loss, losses, fits = torch.zeros((), device=device), [], True
    try:
        for step, micro in enumerate(update[rank]):
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(batches).items()}
            # Dropout is keyed like all else that is random, so that a resumed run repeats it.
            torch.manual_seed(keyed_seed(args.seed, "dropout", done, step, rank))
            with accelerator.no_sync(learner.model):  # gradients are summed over processes when all are there
                loss = squared_error(
                    learner.model, batch, inputs.condition_mask, inputs.silence_latent, inputs.null_condition_emb
                )
                loss = micro.weight * loss / elements
                learner.parallel.backward(loss)
            update_loss += loss.detach()
            losses.append(([tracks[item.track].id for item in micro.items], batch["sigmas"], loss.detach()))
    except RuntimeError as error:
        if not learner.parallel.can_repeat(error):
            raise
        fits = False
    return torch.stack([update_loss, update_loss.new_tensor(not fits)]), losses


def squared_error(model, batch: dict, condition_mask, silence_latent, null_condition_emb):
    """One forward pass: mix noise in, predict the velocity, and sum the (weighted) squared errors of every element.

    The precision is that of `null_condition_emb`, which is the frozen model's.
    """
    from acestep_pipeline.conditioning import context_latents, drop_conditions
    from acestep_pipeline.flow_matching import interpolate, squared_error_sum, velocity_target

    dtype = null_condition_emb.dtype
    # The timestep that the model sees, in its precision, is the one that the latents are mixed with.
    sigmas = batch["sigmas"].to(dtype)
    noisy_latents = interpolate(batch["latents"], batch["noise"], sigmas.float())
    context = context_latents(silence_latent, noisy_latents.shape[1]).expand(len(noisy_latents), -1, -1)
    conditions = drop_conditions(batch["encoder_hidden_states"].to(dtype), null_condition_emb, batch["dropped"])
    condition_mask.set(batch.get("condition_mask"))
    velocity = model(
        hidden_states=noisy_latents.to(dtype),
        timestep=sigmas,
        timestep_r=sigmas,
        encoder_hidden_states=conditions,
        context_latents=context.to(dtype),
        return_dict=False,
    )[0]
    return squared_error_sum(velocity, velocity_target(batch["latents"], batch["noise"]), batch.get("loss_weights"))


def error_of(inputs: TrainingInputs) -> Callable[[torch.nn.Module, dict], torch.Tensor]:
    """`squared_error` of a model and a batch, with all else that it takes."""
    return functools.partial(
        squared_error,
        condition_mask=inputs.condition_mask,
        silence_latent=inputs.silence_latent,
        null_condition_emb=inputs.null_condition_emb,
    )


def compile_passes(inputs: TrainingInputs, planner: EpochPlanner, learner: Learner, loader: BatchLoader) -> None:
    """Compile the blocks for the lengths that are to come, each compared with the plain blocks first."""
    from acestep_pipeline.training.setup import WEIGHT_DTYPES

    accelerator = learner.accelerator
    with accelerator.no_sync(learner.model):
        inputs.compiled.compile_common(
            planner,
            loader,
            forward=functools.partial(error_of(inputs), learner.model),
            parameters=learner.parameters,
            precision=WEIGHT_DTYPES[accelerator.mixed_precision],
            device=accelerator.device,
        )
    accelerator.print(inputs.compiled.describe(inputs.frames_per_second))


def observe(validator: Validator, previewer: Previewer, learner: Learner, *, update: int, num_updates: int) -> None:
    """Measure and listen to the adapter where that is due after so many updates; before the first, as it was made."""
    as_used = learner.averaged if update else contextlib.nullcontext
    if validator.is_due(update, num_updates):
        with as_used():
            validator.validate(learner.transformer, update=update)
    if previewer.is_due(update):
        with as_used():
            previewer.write(learner.transformer, update=update)


def save(
    args: argparse.Namespace, inputs: TrainingInputs, planner: EpochPlanner, learner: Learner, validator: Validator
) -> Measured:
    """Write the adapter, and measure what it does to the loss; call it on every process."""
    from acestep_pipeline.adapters.trainable import save_lora
    from acestep_pipeline.training.comparison import measure_effect

    with learner.averaged():
        if learner.accelerator.is_main_process:
            with naming_failed_writes(args.output_dir, LORA_WEIGHTS_NAME):
                save_lora(learner.transformer, args.output_dir)
        return measure_effect(
            validator.meter,
            learner.transformer,
            held_out=inputs.held_out,
            trained_on=inputs.tracks,
            max_train_tracks=args.max_validation_samples,
            num_items=args.num_updates * planner.effective_batch_size,
        )


if __name__ == "__main__":
    with one_sentence_errors(debug="--debug" in sys.argv):
        train(arguments.parse_args())
