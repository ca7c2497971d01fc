#!/usr/bin/env python
"""Train a LoRA for ACE-Step 1.5 on a folder of music.

    accelerate launch train_ace_step_lora.py --preset c

The loop is in `train`; what it is made of is in `acestep_pipeline/`.
"""

import argparse
import contextlib
import gc
import math
import shlex
import sys
import time

from acestep_pipeline.errors import RunError, UsageError, one_sentence_errors
from acestep_pipeline.paths import cache_dir
from acestep_pipeline.training import arguments


def report_problems(problems: list, *, strict: bool, say) -> None:
    """Name every skipped track and every warning; with `strict` a skipped track is an error."""
    from acestep_pipeline.data.tracks import describe_problems

    skipped = [problem for problem in problems if problem.skipped]
    if problems:
        say(f"{len(skipped)} tracks skipped, {len(problems) - len(skipped)} warnings:")
        say("\n".join(describe_problems(problems)))
    if skipped and strict:
        raise UsageError(
            f"--strict: {len(skipped)} tracks can't be used, the first is {skipped[0].track}: {skipped[0].reason}."
        )


def cache_tracks(accelerator, pipeline, tracks: list, args: argparse.Namespace, say) -> list:
    """Encode what the cache lacks, each process its share, and return the usable tracks in order on every process."""
    from accelerate.utils import gather_object

    from acestep_pipeline.data.latent_cache import LatentCache, prepare_tracks

    for encoder in (pipeline.vae, pipeline.text_encoder, pipeline.condition_encoder):
        encoder.to(accelerator.device)
    cache = LatentCache(args.latent_cache_dir or cache_dir() / "latents", pipeline)
    share = tracks[accelerator.process_index :: accelerator.num_processes]
    own, found = prepare_tracks(
        cache, share, max_duration_s=args.max_duration_s, show_progress=accelerator.is_local_main_process
    )
    problems = gather_object(found)
    report_problems(problems, strict=args.strict, say=say)
    by_id = {entry.id: entry for entry in gather_object(own)}
    cached = [by_id[track.id] for track in tracks if track.id in by_id]
    if not cached:
        raise UsageError("no track can be trained on: " + "; ".join(f"{p.track}: {p.reason}" for p in problems)[:2000])
    return cached


def tracker_config(args: argparse.Namespace) -> dict:
    """The arguments as the plain values that every tracker takes."""
    plain = (int, float, str, bool)
    return {name: value if isinstance(value, plain) else str(value) for name, value in vars(args).items()}


def finish(args, cached: list, facts: dict, *, device, weight_dtype, training_s: float) -> None:
    """Load what was written as a user would, let it be heard, write the card, and say what to do next."""
    from acestep_pipeline import ACEStepPipeline, __version__
    from acestep_pipeline.adapters import LORA_WEIGHTS_NAME
    from acestep_pipeline.model_card import plot_loss, write_model_card
    from acestep_pipeline.training.run_directory import CARD_NAME, PLOT_NAME, SAMPLES_DIR
    from acestep_pipeline.training.tracking import METRICS_NAME, read_metrics
    from acestep_pipeline.training.validation import choose_prompts, write_samples

    prompts = choose_prompts(
        [track.fields for track in cached],
        prompt=args.validation_prompt,
        num_samples=args.num_validation_samples,
        duration_s=args.validation_duration_s,
    )
    samples = []
    if prompts:
        pipeline = ACEStepPipeline.from_pretrained(
            args.pretrained_model_name_or_path,
            variant_dir=args.variant_dir,
            revision=args.revision,
            cache_dir=args.cache_dir,
            torch_dtype=weight_dtype,
        ).to(device)
        pipeline.load_lora_weights(args.output_dir)
        samples = write_samples(
            pipeline,
            prompts,
            num_inference_steps=args.validation_inference_steps,
            seed=args.seed,
            directory=args.output_dir / SAMPLES_DIR,
        )
    metrics = read_metrics(args.output_dir / METRICS_NAME)
    plot_loss(metrics, args.output_dir / PLOT_NAME)
    batch = f"{args.gradient_accumulation_steps} × {args.train_batch_size} tracks a process"
    schedule = f"{args.lr_scheduler}, {args.lr_warmup_steps} updates of warm-up"
    write_model_card(
        args.output_dir / CARD_NAME,
        name=args.exp_name,
        version=__version__,
        base_model=args.pretrained_model_name_or_path,
        rows=[
            ("base", f"`{args.pretrained_model_name_or_path}` (SHA-256 of its DiT: `{facts['model_sha256'][:16]}…`)"),
            ("tracks", str(len(cached))),
            ("LoRA", f"rank {args.rank}, alpha {args.lora_alpha:g}, dropout {args.lora_dropout:g}"),
            ("targets", ", ".join(facts["lora"]["target_modules"])),
            ("updates", f"{args.num_updates} of {batch}"),
            ("learning rate", f"{args.learning_rate:g}, {schedule}"),
            ("precision, seed", f"{args.mixed_precision}, {args.seed}"),
            ("time", f"{training_s:.0f} s"),
        ],
        samples=samples,
        plot=PLOT_NAME,
        prompt=cached[0].fields.prompt,
    )
    tenth = max(1, len(metrics) // 10)
    start, end = (sum(line["loss"] for line in lines) / tenth for lines in (metrics[:tenth], metrics[-tenth:]))
    model = f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}"
    model += f" --variant_dir {args.variant_dir}" if args.variant_dir else ""
    prompt = shlex.quote(cached[0].fields.prompt)
    print(f"\nTrained {args.num_updates} updates in {training_s:.0f} s; ", end="")
    print(f"mean loss of the first tenth {start:.4f}, of the last {end:.4f}.")
    print(f"  adapter        {args.output_dir / LORA_WEIGHTS_NAME}")
    for sample in samples:
        print(f"  with adapter   {args.output_dir / sample['with_adapter']}")
        print(f"  without        {args.output_dir / sample['without_adapter']}")
    print(f"  model card     {args.output_dir / CARD_NAME}")
    print(f"Next: acestep-lora generate {model} --adapter {args.output_dir} --prompt {prompt} --output out.wav")


def train(args: argparse.Namespace) -> None:
    """The whole run: sources, cache, adapter, loop, adapter directory, samples."""
    sources = arguments.choose_sources(args)
    arguments.check_args(args)
    from acestep_pipeline.training.run_directory import check_run_directory, clear_run

    resuming = args.resume_from_checkpoint is not None
    check_run_directory(args.output_dir, resuming=resuming, overwrite=args.overwrite_output_dir)

    import torch
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, parse_flag_from_env
    from torch.utils.data import DataLoader

    from acestep_pipeline import flow_matching
    from acestep_pipeline.adapters import LoraSettings, add_lora, describe, parse_targets, save_lora
    from acestep_pipeline.conditioning import context_latents, drop_conditions
    from acestep_pipeline.data.batching import (
        DrawSettings,
        MicroBatchDataset,
        keyed_seed,
        plan_epoch,
        updates_per_epoch,
    )
    from acestep_pipeline.data.latent_cache import fingerprint
    from acestep_pipeline.data.tracks import dataset_fingerprint, load_tracks
    from acestep_pipeline.hardware import default_device, describe_device
    from acestep_pipeline.pipeline import ACEStepPipeline
    from acestep_pipeline.progress import progress_bar
    from acestep_pipeline.training import checkpointing, optimization, tracking

    # ----------------------------------------------------------------------------------------------- accelerator
    # Said aloud, or a torchrun on a machine without a GPU becomes so many runs that know nothing of each other.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or default_device().type == "cpu"
    device = PartialState(cpu=on_cpu).device
    wanted_precision, args.mixed_precision = (
        args.mixed_precision,
        arguments.usable_precision(args.mixed_precision, device),
    )
    log_with = None if args.report_to == "none" else args.report_to
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=args.mixed_precision,
        log_with=log_with,
        project_config=ProjectConfiguration(str(args.output_dir), str(args.output_dir / args.logging_dir)),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    main = accelerator.is_main_process
    say = accelerator.print
    weight_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[args.mixed_precision]
    if args.allow_tf32:
        torch.set_float32_matmul_precision("high")
    for name, value in {**sources, "Device": describe_device(device), "Precision": args.mixed_precision}.items():
        say(f"{name + ':':<11}{value}")
    if args.mixed_precision != wanted_precision:
        say(f"warning: this {device.type} has no fast {wanted_precision}, which would be slower: training in fp32.")

    # ------------------------------------------------------------------------------------------- data and models
    tracks, problems = load_tracks(
        args.train_data_dir,
        dataset_name=args.dataset_name,
        min_duration_s=args.min_duration_s,
        max_train_samples=args.max_train_samples,
        show_progress=main,
    )
    report_problems(problems, strict=args.strict, say=say)
    pipeline = ACEStepPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        variant_dir=args.variant_dir,
        revision=args.revision,
        cache_dir=args.cache_dir,
        torch_dtype=weight_dtype,
        vae_dtype=torch.float32,
    )
    lora = LoraSettings(
        r=args.rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=parse_targets(args.lora_layers),
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
    )
    model_hash = fingerprint(pipeline.transformer)
    arguments.fill_model_defaults(args, pipeline.transformer.config, is_turbo=pipeline.is_turbo)
    lora_parameters = add_lora(
        pipeline.transformer, lora, seed=args.seed
    )  # before the cache: a wrong target fails now
    cached = cache_tracks(accelerator, pipeline, tracks, args, say)

    # Only the DiT stays: the VAE, the text encoder and the condition encoder have done their work.
    transformer, frames_per_second = pipeline.transformer, pipeline.latents_per_second
    silence_latent = pipeline.condition_encoder.silence_latent.to(device, torch.float32, copy=True)
    null_condition_emb = pipeline.condition_encoder.null_condition_emb.detach().to(device, weight_dtype, copy=True)
    del pipeline
    gc.collect()
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train()

    # ------------------------------------------------------------------------------------- optimizer and schedule
    items_per_update = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    per_epoch = updates_per_epoch(len(cached), items_per_update)
    num_updates = args.num_updates = args.max_train_steps or args.num_train_epochs * per_epoch
    if args.lr_warmup_steps is None:
        args.lr_warmup_steps = optimization.default_warmup_steps(num_updates)
    optimizer = optimization.build_optimizer(
        lora_parameters,
        learning_rate=args.learning_rate,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        adam_weight_decay=args.adam_weight_decay,
        adam_epsilon=args.adam_epsilon,
    )
    lr_scheduler = optimization.build_lr_scheduler(
        optimizer,
        lr_scheduler=args.lr_scheduler,
        lr_warmup_steps=args.lr_warmup_steps,
        num_updates=num_updates,
        lr_num_cycles=args.lr_num_cycles,
        lr_power=args.lr_power,
    )
    model, optimizer = accelerator.prepare(
        transformer, optimizer
    )  # the schedule counts updates, so it is stepped here

    # ----------------------------------------------------------------------------------------------------- resume
    facts = {"model_sha256": model_hash, "dataset_sha256": dataset_fingerprint(tracks), "lora": describe(lora)}
    settings = {name: getattr(args, name) for name in arguments.RESUME_SETTINGS} | facts
    settings |= {"num_processes": accelerator.num_processes, "tracks": [track.id for track in cached]}
    if args.lr_scheduler.startswith("constant"):
        settings["num_updates"] = None  # such a run may be made longer
    done = 0
    checkpoint = checkpointing.find_checkpoint(args.output_dir, args.resume_from_checkpoint) if resuming else None
    state = {
        "transformer": transformer,
        "optimizer": optimizer,
        "lr_scheduler": lr_scheduler,
        "scaler": accelerator.scaler,
    }
    if checkpoint is not None:
        checkpointing.check_same_settings(checkpoint, settings)
        done = checkpointing.load_checkpoint(checkpoint, **state)
        say(f"Resuming from {checkpoint}: {done} of {num_updates} updates are done.")
    elif resuming:
        say(f"There is no checkpoint in {args.output_dir} yet: starting from the beginning.")
    if main:
        if checkpoint is None and args.overwrite_output_dir:
            clear_run(args.output_dir)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        tracking.write_training_args(args.output_dir, arguments=vars(args), facts=facts)
        metrics_file = tracking.MetricsFile(args.output_dir, first_update=done)
    accelerator.wait_for_everyone()
    if log_with:
        accelerator.init_trackers("ace-step-lora", config=tracker_config(args))

    # ------------------------------------------------------------------------------------------------------- loop
    minutes = sum(track.crop_frames for track in cached) / frames_per_second / 60
    say(
        f"Training {sum(p.numel() for p in lora_parameters):,} parameters on {len(cached)} tracks ({minutes:.1f} min "
        f"of crops): {num_updates} updates of {items_per_update} tracks, {per_epoch} an epoch."
    )
    draw = DrawSettings(seed=args.seed, cfg_dropout=args.cfg_dropout, mu=args.timestep_mu, sigma=args.timestep_sigma)
    shapes = [(track.crop_frames, track.num_condition_tokens) for track in cached]
    channels = silence_latent.shape[-1]
    started = time.monotonic()
    progress = progress_bar(total=num_updates, initial=done, desc="Training", unit="update", disable=not main)
    while done < num_updates:
        epoch = done // per_epoch
        plan = plan_epoch(
            shapes,
            epoch=epoch,
            seed=args.seed,
            micro_batch_size=args.train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            num_processes=accelerator.num_processes,
        )[done % per_epoch :][: num_updates - done]
        own = [micro for update in plan for micro in update[accelerator.process_index]]
        batches = iter(
            DataLoader(
                MicroBatchDataset(cached, own, draw),
                batch_size=None,
                num_workers=args.dataloader_num_workers,
                pin_memory=device.type == "cuda",
            )
        )
        for update in plan:
            micro_batches = update[accelerator.process_index]
            # Dividing by the elements of the whole update, on every process, makes its loss one plain mean.
            elements = channels * sum(
                cached[item].crop_frames for own in update for micro in own if micro.weight for item in micro.items
            )
            update_loss = torch.zeros((), device=device)
            for step, micro in enumerate(micro_batches):
                batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(batches).items()}
                # Dropout's random numbers are keyed too, so that a resumed run repeats them.
                torch.manual_seed(keyed_seed(args.seed, "dropout", done, step, accelerator.process_index))
                # The timestep that the model sees, in its precision, is the one the latents are mixed with.
                sigmas = batch["sigmas"].to(weight_dtype)
                noisy = flow_matching.interpolate(batch["latents"], batch["noise"], sigmas.float())
                conditions = drop_conditions(
                    batch["encoder_hidden_states"].to(weight_dtype), null_condition_emb, batch["dropped"]
                )
                context = context_latents(silence_latent, noisy.shape[1]).expand(noisy.shape[0], -1, -1)
                last = step == len(micro_batches) - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    velocity = model(
                        hidden_states=noisy.to(weight_dtype),
                        timestep=sigmas,
                        timestep_r=sigmas,
                        encoder_hidden_states=conditions,
                        context_latents=context.to(weight_dtype),
                        return_dict=False,
                    )[0]
                    target = flow_matching.velocity_target(batch["latents"], batch["noise"])
                    loss = micro.weight * flow_matching.squared_error_sum(velocity, target) / elements
                    accelerator.backward(loss * accelerator.num_processes)  # DDP takes the mean over processes
                update_loss += loss.detach()
            grad_norm = accelerator.clip_grad_norm_(lora_parameters, args.max_grad_norm)
            update_loss = accelerator.reduce(update_loss, "sum").item()
            if not (math.isfinite(update_loss) and math.isfinite(float(grad_norm))):
                names = ", ".join(sorted({cached[item].id for own in update for micro in own for item in micro.items}))
                kept = checkpointing.list_checkpoints(args.output_dir)
                raise RunError(
                    f"the loss or gradient of update {done + 1} is not finite (tracks: {names}); try a lower "
                    f"--learning_rate or --max_grad_norm. Kept: {kept[-1] if kept else 'no checkpoint yet'}."
                )
            line = {"loss": update_loss, "grad_norm": float(grad_norm), "lr": lr_scheduler.get_last_lr()[0]}
            optimizer.step()
            if not accelerator.optimizer_step_was_skipped:
                lr_scheduler.step()
            optimizer.zero_grad()
            done += 1

            progress.update()
            progress.set_postfix(loss=f"{update_loss:.4f}", lr=f"{line['lr']:.2e}", refresh=False)
            if log_with:
                accelerator.log(line, step=done)
            if main:
                seconds = round(time.monotonic() - started, 3)
                metrics_file.write({"update": done, "epoch": epoch, **line, "seconds": seconds})
                if done % args.checkpointing_steps == 0 or done == num_updates:
                    checkpointing.save_checkpoint(
                        args.output_dir,
                        update=done,
                        settings=settings,
                        total_limit=args.checkpoints_total_limit,
                        **state,
                    )
    progress.close()

    # ------------------------------------------------------------------------------------------------------- save
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if main:
        metrics_file.close()
        save_lora(transformer, args.output_dir)
        training_s = time.monotonic() - started
        del model, transformer, optimizer, state, lora_parameters
        gc.collect()
        finish(args, cached, facts, device=device, weight_dtype=weight_dtype, training_s=training_s)


if __name__ == "__main__":
    with one_sentence_errors(debug="--debug" in sys.argv):
        train(arguments.parse_args())
