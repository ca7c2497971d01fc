"""Ways to train the same DiT on the same windows, for `training_speed.py` to compare.

Each way is a generator that ends an optimizer update at every `yield`:

- `ours`: the steps of `train_ace_step_lora.py`'s loop, with the package's functions, on a latent cache on disk;
- `ours_dense`: the same with diffusers' own attention, and its dense masks;
- `compiled`: ours with the blocks compiled, as `--torch_compile` does it;
- `one_by_one`, `padded`, `plain_optimizer`, `waiting`, `not_read_ahead`: ours without one trick each (`Tricks`);
- `checkpointed`, `half_checkpointed`: ours with all blocks, or half of them, computed again;
- `bare`: forward, backward, clip and AdamW on batches that lie in memory, written down without a package;
- `peers`: as other trainers of this model do it: one window in a forward pass, four of them accumulated, conditions
  padded to ~770 tokens that are attended to, a dense additive mask in every attention, AdamW in plain loops.
"""

import contextlib
import functools
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from acestep_pipeline.data import batching
from acestep_pipeline.training import optimization
from acestep_pipeline.training.health import NanGuard
from acestep_pipeline.training.interruption import Interruption
from acestep_pipeline.training.parallelism import choose_parallelism
from acestep_pipeline.training.tracking import MetricsFile
from benchmarks.training_bench import Bench
from benchmarks.training_cases import PADDED_TOKENS, PRESET, RATIOS, TRICKS, Tricks


def bare(bench: Bench) -> Iterator[None]:
    """Forward, backward, clip, AdamW, on batches of four windows in memory."""
    optimizer = torch.optim.AdamW(bench.parameters, lr=PRESET["learning_rate"])
    return _plain_loop(bench, optimizer, itertools.cycle(bench.in_memory(bench.effective_batch_size)))


def peers(bench: Bench) -> Iterator[None]:
    """Windows one by one, padded conditions, AdamW in plain loops."""
    updates = bench.in_memory(1)
    for batch in itertools.chain.from_iterable(updates):
        states = batch["encoder_hidden_states"]
        missing = PADDED_TOKENS - states.shape[1]
        batch["encoder_hidden_states"] = torch.nn.functional.pad(states, (0, 0, 0, missing))
    optimizer = torch.optim.AdamW(bench.parameters, lr=PRESET["learning_rate"], foreach=False, fused=False)
    return _plain_loop(bench, optimizer, itertools.cycle(updates))


def _plain_loop(bench: Bench, optimizer: torch.optim.Optimizer, updates: Iterator) -> Iterator[None]:
    autocast = functools.partial(
        torch.autocast, bench.device.type, bench.dtype, enabled=bench.dtype is not torch.float32
    )
    elements = bench.elements(bench.effective_batch_size)
    for batches in updates:
        for batch in batches:
            with autocast():
                loss = bench.loss(bench.bare_forward, batch) / elements
            bench.clock.ended("forward")
            loss.backward()
            bench.clock.ended("backward")
        torch.nn.utils.clip_grad_norm_(bench.parameters, PRESET["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        bench.clock.ended("optimizer")
        yield


def ours(bench: Bench, tricks: Tricks) -> Iterator[None]:
    """The loop of the script: data read ahead from the cache, NaN guard, schedule, metrics and all."""
    parallel = choose_parallelism(bench.accelerator, max_grad_norm=PRESET["max_grad_norm"])
    optimizer = optimization.build_optimizer(
        bench.parameters, optimizer="adamw", learning_rate=PRESET["learning_rate"], adam_beta1=0.9,
        adam_beta2=0.999, adam_weight_decay=1e-2, adam_epsilon=1e-8,
        fused=bench.device.type == "cuda" and tricks.joint_optimizer,
    )  # fmt: skip
    if not tricks.joint_optimizer:
        for group in optimizer.param_groups:
            group["foreach"] = False
    lr_scheduler = optimization.build_lr_scheduler(
        optimizer, lr_scheduler=PRESET["lr_scheduler"], lr_warmup_steps=100, num_updates=10**6
    )
    optimizer = bench.accelerator.prepare_optimizer(optimizer)
    guard, interruption = NanGuard(stops=True, scaler=None), Interruption()
    metrics = MetricsFile(Path(tempfile.mkdtemp(dir=bench.folder)), first_update=0)
    planner = bench.planner(bench.effective_batch_size if tricks.one_pass else 1)
    loader = bench.bucketed_loader if tricks.compiled else bench.loader
    if tricks.compiled:
        bench.blocks.compiled.compile_common(
            planner, loader, forward=functools.partial(bench.loss, bench.model), parameters=bench.parameters,
            precision=bench.dtype, device=bench.device,
        )  # fmt: skip
    plans, ahead = itertools.tee(planner.plans_from(0, 10**6))
    micro_batches = (micro for update in ahead for micro in update[0])
    batches = loader.stream(micro_batches, num_workers=int(tricks.read_ahead))
    with contextlib.closing(batches), contextlib.closing(metrics):
        try:
            for done, update in enumerate(plans):
                own = batches if tricks.trimmed else map(pad_to_most, batches)
                line = _our_update(bench, update[0], own, parallel, interruption, tricks)
                if not guard.refuses(line["loss"], line["grad_norm"]):
                    optimizer.step()
                    lr_scheduler.step()
                optimizer.zero_grad()
                bench.clock.ended("optimizer")
                line["lr"] = optimization.current_learning_rate(optimizer)
                metrics.write({"update": done + 1, **line})
                bench.clock.ended("other")
                yield
        finally:
            interruption.release()


def _our_update(
    bench: Bench, micro_batches: list, batches: Iterator, parallel, interruption: Interruption, tricks: Tricks
) -> dict:
    """Forward and backward passes of an update, and what comes of them."""
    items = [item for micro in micro_batches for item in micro.items]
    update_loss = torch.zeros((), device=bench.device)
    for step, micro in enumerate(micro_batches):
        batch = {name: tensor.to(bench.device, non_blocking=True) for name, tensor in next(batches).items()}
        bench.clock.ended("data")
        torch.manual_seed(batching.keyed_seed(42, "dropout", micro.update, step, 0))
        loss = bench.loss(bench.model, batch) * (micro.weight / bench.elements(len(items)))
        if not tricks.no_waiting:
            loss.item()
        bench.clock.ended("forward")
        parallel.backward(loss)
        update_loss += loss.detach()
        if not tricks.no_waiting:
            batch["sigmas"].tolist(), update_loss.item(), bench.parameters[-1].grad.norm().item()
        bench.clock.ended("backward")
    sums = torch.stack([update_loss, update_loss.new_tensor(False)])
    (update_loss, _), _ = interruption.agree(bench.accelerator, sums)
    bench.clock.ended("other")
    return {"loss": update_loss, "grad_norm": parallel.finish_gradients(bench.parameters)}


WITHOUT_PACKAGE = {"bare": bare, "peers": peers}


def steps(bench: Bench, way: str) -> Iterator[None]:
    """The updates of a way, each to be made within its own `attention`."""
    if way in WITHOUT_PACKAGE:
        return WITHOUT_PACKAGE[way](bench)
    return ours(bench, TRICKS.get(way, Tricks()))


def attention(bench: Bench, way: str) -> contextlib.AbstractContextManager:
    """What `way` attends and computes with, set up here; and what its updates have to be made within."""
    dense = way in (*WITHOUT_PACKAGE, "ours_dense")
    bench.blocks.use(RATIOS.get(way, bench.case.checkpointing), dense=dense, compiled=way == "compiled")
    return bench.blocks.dense_masks() if way == "peers" else contextlib.nullcontext()


def pad_to_most(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch with conditions of `PADDED_TOKENS`, the padding hidden by a mask."""
    states = batch["encoder_hidden_states"]
    items, tokens = states.shape[:2]
    mask = batch.get("condition_mask", torch.ones(items, tokens, dtype=torch.bool))
    missing = PADDED_TOKENS - tokens
    return batch | {
        "encoder_hidden_states": torch.nn.functional.pad(states, (0, 0, 0, missing)),
        "condition_mask": torch.nn.functional.pad(mask, (0, missing)),
    }
