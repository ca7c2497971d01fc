#!/usr/bin/env python
"""Train a LoRA for ACE-Step 1.5 on a folder of music.

    accelerate launch train_ace_step_lora.py --preset c

This file is the training loop; what it is made of is in `acestep_pipeline/`. The command line is in
`acestep_pipeline/training/arguments.py`.
"""

import argparse
import functools
import itertools
import sys
import time
from pathlib import Path

from acestep_pipeline.errors import RunError, one_sentence_errors
from acestep_pipeline.paths import LORA_WEIGHTS_NAME, cache_dir
from acestep_pipeline.training import arguments, settings
from acestep_pipeline.training.argument_checks import check_args
from acestep_pipeline.training.hub_release import prepare_push, push_run
from acestep_pipeline.training.launch import is_first_process
from acestep_pipeline.training.remote_checkpoints import fetch_checkpoint
from acestep_pipeline.training.run_directory import (
    check_run_directory,
    clear_leftovers,
    clear_run,
    describe_checkpoint,
    find_checkpoint,
    mark_finished,
    naming_failed_writes,
    nothing_left_to_do,
)
from acestep_pipeline.training.uploading import STOP_GRACE_S, Uploads, open_uploads


def check(args: argparse.Namespace) -> tuple[dict[str, str], Path | None, Uploads]:
    """Everything that can be refused at once, before torch is even imported.

    Returns:
        What was chosen, the checkpoint to resume from, and what publishes the run.
    """
    sources = settings.choose_sources(args)
    check_args(args)
    resuming = args.resume_from_checkpoint is not None
    check_run_directory(args.output_dir, resuming=resuming, overwrite=args.overwrite_output_dir)
    if args.push_to_hub:
        tag = None if resuming else args.hub_tag  # a run that is resumed may have made it
        args.hub_model_id = prepare_push(
            args.hub_model_id, exp_name=args.exp_name, private=args.hub_private_repo, tag=tag
        )
    uploads = open_uploads(args.push_to_s3, args.output_dir, may_exist=resuming or args.overwrite_output_dir)
    if not resuming:
        return sources, None, uploads
    wanted = fetch_checkpoint(args.output_dir, args.resume_from_checkpoint, address=args.push_to_s3)
    return sources, find_checkpoint(args.output_dir, wanted), uploads


def publish(args: argparse.Namespace) -> None:
    """What the flags say is to be published of a finished run; nothing is sent twice."""
    if args.push_to_hub and is_first_process():
        how = {"private": args.hub_private_repo, "tag": args.hub_tag}
        print(push_run(args.output_dir, hub_model_id=args.hub_model_id, **how))


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


def train(args: argparse.Namespace) -> None:
    """The whole run: accelerator → models and data → optimizer → resume → the loop → save."""
    command = dict(vars(args))
    sources, checkpoint, uploads = check(args)
    if args.resume_from_checkpoint == "latest" and checkpoint and nothing_left_to_do(args.output_dir, command):
        return publish(args)

    import torch
    from accelerate.utils.memory import clear_device_cache

    from acestep_pipeline.adapters.trainable import save_lora
    from acestep_pipeline.checkpoint_source import open_checkpoint
    from acestep_pipeline.data import batching
    from acestep_pipeline.hardware import describe_device
    from acestep_pipeline.progress import progress_bar
    from acestep_pipeline.training import checkpointing, optimization, setup, tracking
    from acestep_pipeline.training.batch_size import BatchSize
    from acestep_pipeline.training.comparison import measure_effect
    from acestep_pipeline.training.ema import AdapterAverage
    from acestep_pipeline.training.fetching import fetch_meanwhile
    from acestep_pipeline.training.final_report import write_final_report
    from acestep_pipeline.training.health import NanGuard
    from acestep_pipeline.training.interruption import Interruption, interrupted
    from acestep_pipeline.training.memory import samples_one_by_one
    from acestep_pipeline.training.parallelism import choose_parallelism
    from acestep_pipeline.training.previews import Previewer
    from acestep_pipeline.training.processes import check_same_everywhere
    from acestep_pipeline.training.run_costs import cost_rows
    from acestep_pipeline.training.validation import choose_prompts
    from acestep_pipeline.training.validation_loss import LossMeter
    from acestep_pipeline.training.validator import Validator

    # ------------------------------------------------------------------------------------------------ accelerator
    accelerator = setup.build_accelerator(
        mixed_precision=args.mixed_precision,
        report_to=args.report_to,
        output_dir=args.output_dir,
        logging_dir=args.logging_dir,
        allow_tf32=args.allow_tf32,
    )
    say, main, device = accelerator.print, accelerator.is_main_process, accelerator.device
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    weight_dtype = setup.WEIGHT_DTYPES[accelerator.mixed_precision]
    for name, value in {
        **sources,
        "Device": describe_device(device),
        "Precision": str(weight_dtype).removeprefix("torch."),
    }.items():
        say(f"{name + ':':<11}{value}")
    if accelerator.mixed_precision != args.mixed_precision:
        say(f"warning: this {device.type} has no fast {args.mixed_precision} and would be slower with it: using fp32.")
        args.mixed_precision = accelerator.mixed_precision
    if args.resume_from_checkpoint is not None:
        check_same_everywhere({"the checkpoint to resume from": describe_checkpoint(checkpoint)})

    # -------------------------------------------------------------------------------------------- models and data
    checkpoint_source = {
        name: getattr(args, name) for name in ("pretrained_model_name_or_path", "variant_dir", "revision", "cache_dir")
    }
    text = settings.text_options(args)
    inputs = setup.prepare_inputs(
        accelerator,
        checkpoint=checkpoint_source,
        train_data_dir=args.train_data_dir,
        dataset_name=args.dataset_name,
        validation_data_dir=args.validation_data_dir,
        validation_fraction=args.validation_fraction,
        max_validation_samples=args.max_validation_samples,
        validation_seed=args.validation_seed,
        max_train_samples=args.max_train_samples,
        min_duration_s=args.min_duration_s,
        max_duration_s=args.max_duration_s,
        streaming=args.streaming,
        strict=args.strict,
        latent_cache_dir=args.latent_cache_dir or cache_dir() / "latents",
        text=text,
        lora=settings.lora_settings(args),
        base_quantization=args.base_quantization,
        gradient_checkpointing=args.gradient_checkpointing_ratio if args.gradient_checkpointing else 0.0,
        offload=args.offload,
        torch_compile=args.torch_compile,
        seed=args.seed,
    )
    transformer, tracks, facts, dataset = inputs.transformer, inputs.tracks, inputs.facts, inputs.dataset
    settings.fill_model_defaults(args, transformer.config, is_turbo=inputs.is_turbo)
    listens = bool(args.num_validation_samples or args.style_distance) or args.preview_steps is not None
    if main and listens and not inputs.encoders_used and open_checkpoint(**checkpoint_source).is_remote:
        say("The rest of the checkpoint, which samples need, is fetched while the DiT trains.")
        fetch_meanwhile(checkpoint_source)

    # -------------------------------------------------------------------------------------- optimizer and schedule
    parallel = choose_parallelism(accelerator, max_grad_norm=args.max_grad_norm)
    batch_size = BatchSize(args.effective_batch_size, args.train_batch_size)
    planner = batching.EpochPlanner(
        tracks,
        seed=args.seed,
        effective_batch_size=batch_size.effective,
        micro_batch_size=batch_size.micro,
        num_processes=num_processes,
        lock_step=parallel.lock_step,
    )
    per_epoch = planner.updates_per_epoch
    num_updates = args.num_updates = args.max_train_steps or args.num_train_epochs * per_epoch
    if args.lr_warmup_steps is None:
        begun_with = checkpoint and checkpointing.saved_setting(checkpoint, "lr_warmup_steps")
        args.lr_warmup_steps = optimization.default_warmup_steps(num_updates) if begun_with is None else begun_with
    optimizer = optimization.build_optimizer(
        inputs.lora_parameters,
        optimizer=args.optimizer,
        learning_rate=args.learning_rate,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        adam_weight_decay=args.adam_weight_decay,
        adam_epsilon=args.adam_epsilon,
        warmup_steps=args.lr_warmup_steps if args.lr_scheduler == "constant_with_warmup" else 0,
        fused=device.type == "cuda" and accelerator.scaler is None,
    )
    lr_scheduler = optimization.build_lr_scheduler(
        optimizer,
        lr_scheduler=args.lr_scheduler,
        lr_warmup_steps=args.lr_warmup_steps,
        num_updates=num_updates,
        lr_num_cycles=args.lr_num_cycles,
        lr_power=args.lr_power,
    )
    # The schedule counts updates, not processes: it is stepped below, and not prepared.
    model, optimizer = parallel.prepare(transformer, optimizer)

    # -------------------------------------------------------------------------------------------------- validation
    error_of = functools.partial(
        squared_error,
        condition_mask=inputs.condition_mask,
        silence_latent=inputs.silence_latent,
        null_condition_emb=inputs.null_condition_emb,
    )
    meter = LossMeter(
        accelerator,
        model,
        error_of,
        config=transformer.config,
        num_draws=args.num_validation_draws,
        seed=args.validation_seed,
    )
    validator = Validator(
        meter,
        inputs.held_out,
        output_dir=args.output_dir,
        steps=settings.validation_steps(
            args,
            updates_per_epoch=per_epoch,
            items_per_update=planner.effective_batch_size,
            num_held_out=len(inputs.held_out),
        ),
        patience=args.early_stopping_patience,
        log_to_tracker=args.report_to != "none",
    )
    listening = {
        "checkpoint": checkpoint_source,
        "device": device,
        "weight_dtype": weight_dtype,
        "one_by_one": samples_one_by_one(args.base_quantization, offload=args.offload),
        "num_inference_steps": args.validation_inference_steps,
        "seed": args.seed,
    }
    prompts = choose_prompts(
        [track.windows[0].fields for track in tracks],
        prompt=args.validation_prompt and text.with_trigger(args.validation_prompt),
        num_samples=max(1, args.num_validation_samples),
        duration_s=args.validation_duration_s,
    )
    previewer = Previewer(args.output_dir, steps=args.preview_steps if main else None, prompts=prompts, **listening)
    average = AdapterAverage(inputs.lora_parameters, args.ema_decay)
    nan_guard = NanGuard(stops=args.on_nan == "stop", scaler=accelerator.scaler)

    # ------------------------------------------------------------------------------------------------------ resume
    state = {
        "transformer": transformer,
        "optimizer": optimizer,
        "lr_scheduler": lr_scheduler,
        "scaler": accelerator.scaler,
        "validator": validator,
        "ema": average,
        "nan_guard": nan_guard,
        "planner": planner,
    }
    identity = settings.resume_settings(args, held_out=[track.id for track in inputs.held_out]) | facts
    identity |= {"tracks": [track.id for track in tracks]}
    done = 0
    if checkpoint is not None:
        checkpointing.check_same_settings(checkpoint, identity)
        done = checkpointing.load_checkpoint(checkpoint, **state)
        say(f"Resuming from {checkpoint}: {done} of {num_updates} updates are done.")
        if change := planner.describe_change():
            say(f"warning: {change}")
        if done == num_updates:
            say("All of them: only the adapter's file and the final report are made again.")
    elif args.resume_from_checkpoint is not None:
        say(f"There is no checkpoint in {args.output_dir} yet: starting from the beginning.")
    if main:
        if args.overwrite_output_dir and checkpoint is None:
            clear_run(args.output_dir)
        for removed in clear_leftovers(args.output_dir, update=done):
            say(f"Removed {removed}: it lies beyond the update that is resumed from, and is made again.")
        if checkpoint is None:
            uploads.start_over()
        tracking.write_training_args(args.output_dir, arguments=vars(args), facts=facts | {"dataset": dataset})
        metrics_file = tracking.MetricsFile(args.output_dir, first_update=done)
    accelerator.wait_for_everyone()
    if args.report_to != "none":
        accelerator.init_trackers("ace-step-lora", config=tracking.plain_values(vars(args)))

    # -------------------------------------------------------------------------------------------------------- loop
    say(
        f"Training {sum(p.numel() for p in inputs.lora_parameters):,} parameters on "
        f"{setup.describe_tracks(tracks, inputs.frames_per_second)}: {num_updates} updates, {per_epoch} an epoch.\n"
        f"{batch_size.describe(num_processes)}."
    )
    draw = settings.draw_settings(args, items_per_update=planner.effective_batch_size)
    checkpoint_every = {"every_updates": args.checkpointing_steps, "every_epochs": args.checkpointing_epochs}
    loader = batching.BatchLoader(tracks, draw, pin_memory=device.type == "cuda", bucket_conditions=args.torch_compile)
    channels = inputs.silence_latent.shape[-1]
    started = time.monotonic() - (metrics_file.seconds if main else 0)
    interruption, stop = Interruption(), 0  # from here SIGTERM and SIGINT wait for the end of an update
    progress = progress_bar(total=num_updates, initial=done, desc="Training", unit="update", disable=not main)

    if done == 0:
        validator.validate(transformer, update=0)
        if previewer.is_due(0):
            previewer.write(transformer, update=0)
    # Again from an update whose forward passes did not fit into memory.
    while done < num_updates and not stop and not validator.should_stop:
        if inputs.compiled:
            with accelerator.no_sync(model):
                inputs.compiled.compile_common(
                    planner,
                    loader,
                    forward=functools.partial(error_of, model),
                    parameters=inputs.lora_parameters,
                    precision=weight_dtype,
                    device=device,
                )
            say(inputs.compiled.describe(inputs.frames_per_second))
        plans, ahead = itertools.tee(planner.plans_from(done, num_updates))
        own_micro_batches = (micro for update in ahead for micro in update[rank])
        batches = loader.stream(own_micro_batches, num_workers=args.dataloader_num_workers)
        for update in plans:
            # Dividing by the elements of the whole update, on every process, makes its loss one plain mean.
            items = [item for process in update for micro in process if micro.weight for item in micro.items]
            elements = channels * sum(tracks[item.track].crop_frames for item in items)
            update_loss, losses, fits = torch.zeros((), device=device), [], True
            try:
                for step, micro in enumerate(update[rank]):
                    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(batches).items()}
                    # Dropout is keyed like all else that is random, so that a resumed run repeats it.
                    torch.manual_seed(batching.keyed_seed(args.seed, "dropout", done, step, rank))
                    with accelerator.no_sync(model):  # gradients are summed over processes below
                        loss = squared_error(
                            model, batch, inputs.condition_mask, inputs.silence_latent, inputs.null_condition_emb
                        )
                        loss = micro.weight * loss / elements
                        parallel.backward(loss)
                    update_loss += loss.detach()
                    losses.append(([tracks[item.track].id for item in micro.items], batch["sigmas"], loss.detach()))
            except RuntimeError as error:
                if not parallel.can_repeat(error):
                    raise
                fits = False

            sums = torch.stack([update_loss, update_loss.new_tensor(not fits)])
            (update_loss, misfits), stop = interruption.agree(accelerator, sums)
            if misfits:  # on any process: all of them divide the update anew
                loss = batch = None
                stop = 0  # after the update, as ever: the signal is heard again
                optimizer.zero_grad()
                frames = planner.halve(update)
                clear_device_cache(garbage_collection=True)
                say(
                    f"warning: update {done + 1} did not fit into memory; it is repeated, now with at most "
                    f"{frames / inputs.frames_per_second:g} s of music in a forward pass of several windows."
                )
                break
            grad_norm = parallel.finish_gradients(inputs.lora_parameters)
            line = {"loss": update_loss, "grad_norm": grad_norm, "lr": optimization.current_learning_rate(optimizer)}
            if nan_guard.refuses(update_loss, grad_norm):
                nan_guard.report(accelerator, losses, update=done + 1, output_dir=args.output_dir)
                line["left_out"] = True
            else:
                optimizer.step()
                if not accelerator.optimizer_step_was_skipped:
                    lr_scheduler.step()
                    average.update()
            optimizer.zero_grad()
            epoch = done // per_epoch
            done += 1
            if validator.is_due(done, num_updates):
                with optimization.averaged_weights(optimizer), average.applied():
                    validator.validate(transformer, update=done)
            if previewer.is_due(done):
                with optimization.averaged_weights(optimizer), average.applied():
                    previewer.write(transformer, update=done)
            over = stop or done == num_updates or validator.should_stop

            progress.set_postfix(loss=f"{update_loss:.4f}", lr=f"{line['lr']:.2e}", refresh=False)
            progress.update()
            if args.report_to != "none":
                accelerator.log(line, step=done)
            if main:
                seconds = round(time.monotonic() - started, 3)
                metrics_file.write({"update": done, "epoch": epoch, **line, "seconds": seconds})
            # While updates are left out, the adapter may be what is wrong, and older checkpoints are worth keeping.
            due = checkpointing.is_due(done, per_epoch=per_epoch, **checkpoint_every) and not nan_guard.in_a_row
            if over or due:
                parallel.gather(optimizer)  # of all processes, for the one that writes
                if main:
                    limit = args.checkpoints_total_limit
                    metrics_file.flush_to_disk()
                    saved = checkpointing.save_checkpoint(
                        args.output_dir, update=done, settings=identity, total_limit=limit, **state
                    )
                    uploads.add_checkpoint(saved)
            if over:
                break
        batches.close()
    progress.close()

    # -------------------------------------------------------------------------------------------------------- save
    training_s = time.monotonic() - started
    if main:
        metrics_file.close()
        validator.close()
    if not stop:
        with optimization.averaged_weights(optimizer), average.applied():
            if main:
                with naming_failed_writes(args.output_dir, LORA_WEIGHTS_NAME):
                    save_lora(transformer, args.output_dir)
            measured = measure_effect(
                meter,
                transformer,
                held_out=inputs.held_out,
                trained_on=tracks,
                max_train_tracks=args.max_validation_samples,
                num_items=num_updates * planner.effective_batch_size,
            )
    elif not_sent := uploads.finish(STOP_GRACE_S):
        say(f"warning: {not_sent}")
    accelerator.wait_for_everyone()
    compiled_rows = inputs.compiled.rows() if inputs.compiled else []
    # Before the process group ends: a DDP model that outlives it waits in its destructor for the group's threads,
    # which wait for the interpreter. And the report loads a model of its own.
    del model, transformer, inputs, optimizer, average, state, meter, validator
    accelerator.free_memory()
    accelerator.end_training()
    interruption.release()
    if stop:
        raise interrupted(stop, done=done, num_updates=num_updates, output_dir=args.output_dir)
    if not main:
        return
    say(f"\nTrained {done} updates in {training_s:.0f} s.")
    for name, value in compiled_rows:
        say(f"{name.capitalize()}: {value}.")
    report = write_final_report(
        args.output_dir,
        name=args.exp_name,
        prompts=prompts[: args.num_validation_samples],
        example_prompt=tracks[0].windows[0].fields.prompt,
        about=settings.describe_run(
            args,
            facts,
            dataset=dataset,
            costs=cost_rows(device, num_processes=num_processes, training_s=training_s) + compiled_rows,
        ),
        measured=measured,
        tracks=tracks,
        style_clips=args.style_distance,
        duration_s=args.validation_duration_s,
        **listening,
    )
    print(report)
    uploads.add_adapter()
    not_sent = uploads.finish(args.upload_timeout_s)
    if not_sent:
        say(f"warning: {not_sent}")
    else:
        mark_finished(args.output_dir, command)
    publish(args)
    if not_sent:
        raise RunError(not_sent)


if __name__ == "__main__":
    with one_sentence_errors(debug="--debug" in sys.argv):
        train(arguments.parse_args())
