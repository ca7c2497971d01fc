"""The model and the data of the training benchmark, which all ways of training share."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.adapters.trainable import add_lora
from acestep_pipeline.condition_mask import ConditionMask
from acestep_pipeline.data import batching
from acestep_pipeline.data.draws import DrawSettings
from acestep_pipeline.estimation.memory_use import inspect_adapter
from acestep_pipeline.hardware import default_device
from acestep_pipeline.training import setup
from benchmarks.block_variants import BlockVariants
from benchmarks.device_time import PhaseClock
from benchmarks.random_models import condition_width, random_transformer
from benchmarks.random_tracks import write_tracks
from benchmarks.training_cases import FRAMES_PER_SECOND, PRESET, RATIOS, Case
from train_ace_step_lora import squared_error


class Bench:
    """A DiT with preset c's adapter, and tracks in a cache to train it on."""

    def __init__(self, case: Case, folder: Path) -> None:
        """Build all of it; the precision is the preset's on a GPU and float32 on a CPU."""
        AcceleratorState._reset_state(reset_partial_state=True)
        self.case, self.folder = case, folder
        on_cpu = default_device().type == "cpu"
        self.accelerator = setup.build_accelerator(
            mixed_precision="no" if on_cpu else PRESET["mixed_precision"],
            report_to="none",
            output_dir=folder,
            logging_dir="logs",
            allow_tf32=True,
        )
        self.device = self.accelerator.device
        self.dtype = setup.WEIGHT_DTYPES[self.accelerator.mixed_precision]
        torch.manual_seed(0)
        self.transformer = random_transformer(case.size, device=self.device, dtype=self.dtype)
        settings = LoraSettings(
            r=PRESET["rank"], lora_alpha=float(PRESET["lora_alpha"]), lora_dropout=PRESET["lora_dropout"]
        )
        self.parameters = add_lora(self.transformer, settings, seed=0)
        for parameter in self.parameters:  # the upper matrices start as zeros, and zeros are no input to time
            parameter.detach().normal_(std=0.02)
        self.blocks = BlockVariants(self.transformer, {case.checkpointing, *RATIOS.values()})
        self.blocks.use(case.checkpointing)
        self.adapter = inspect_adapter(self.transformer, dropout=PRESET["lora_dropout"])
        self.transformer.train()
        width = condition_width(self.transformer)
        self.condition_mask = ConditionMask(self.transformer)
        self.silence_latent = torch.randn(1, 15000, 64, device=self.device)
        self.null_condition_emb = torch.randn(1, 1, width, device=self.device, dtype=self.dtype)
        self.tracks = write_tracks(case, width, folder, self.dtype)
        self.effective_batch_size = case.windows
        self.loader, self.bucketed_loader = (
            batching.BatchLoader(
                self.tracks,
                DrawSettings(seed=42, cfg_dropout=0.15, items_per_update=self.effective_batch_size),
                pin_memory=self.device.type == "cuda",
                bucket_conditions=bucketed,
            )
            for bucketed in (False, True)
        )
        self.bare_forward = self.transformer.forward  # which Accelerate wraps
        self.model = self.accelerator.prepare_model(self.transformer)
        self.clock = PhaseClock(self.device)

    def planner(self, micro_batch_size: int) -> batching.EpochPlanner:
        """The updates of a run with so many windows in a forward pass."""
        return batching.EpochPlanner(
            self.tracks,
            seed=42,
            effective_batch_size=self.effective_batch_size,
            micro_batch_size=micro_batch_size,
        )

    def loss(self, model: Callable, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The script's sum of squared errors over a batch."""
        return squared_error(model, batch, self.condition_mask, self.silence_latent, self.null_condition_emb)

    def in_memory(self, micro_batch_size: int) -> list[list[dict[str, torch.Tensor]]]:
        """The batches of an epoch's updates, on the device."""
        return [
            [{name: tensor.to(self.device) for name, tensor in self.loader.load(micro).items()} for micro in update[0]]
            for update in self.planner(micro_batch_size).plan(0)
        ]

    def elements(self, num_items: int) -> int:
        """Numbers in the latents of so many windows."""
        return num_items * self.case.seconds * FRAMES_PER_SECOND * 64
