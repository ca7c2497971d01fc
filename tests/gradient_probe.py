"""The flagship script with eyes on the gradients of its updates, as they are before clipping."""

import contextlib
import os
import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

import train_ace_step_lora
from acestep_pipeline.training import base_model


@contextlib.contextmanager
def watched_gradients():
    """Yield a list that gets the gradient of every update, all parameters in one vector.

    The adapter starts from random values: with its usual zeros in B, A would have no gradient.
    """
    gradients = []
    add_lora, clip = base_model.add_lora, Accelerator.clip_grad_norm_

    def add_random_lora(*args, **kwargs):
        parameters = add_lora(*args, **kwargs)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in parameters:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        return parameters

    def watch(accelerator, parameters, *args, **kwargs):
        parameters = list(parameters)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
        return clip(accelerator, parameters, *args, **kwargs)

    with (
        mock.patch.object(base_model, "add_lora", add_random_lora),
        mock.patch.object(Accelerator, "clip_grad_norm_", watch),
    ):
        yield gradients


if __name__ == "__main__":
    args = train_ace_step_lora.arguments.parse_args(sys.argv[1:])
    with watched_gradients() as seen:
        train_ace_step_lora.train(args)
    name = f"gradients-{os.environ['RANK']}.safetensors"
    save_file({str(update): gradient for update, gradient in enumerate(seen)}, Path(args.output_dir).parent / name)
