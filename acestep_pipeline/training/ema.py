"""An exponential moving average of the adapter: what is saved at the end where `--ema_decay` is set."""

import contextlib
from collections.abc import Iterator

import torch
from diffusers.training_utils import EMAModel


class AdapterAverage:
    """diffusers' `EMAModel` over the trained parameters, in their float32; without a decay it does nothing.

    After `n` updates the decay is `min(decay, n / (n + 9))` (`EMAModel.get_decay`), and the first update's weights are
    taken as they are: the random beginning doesn't linger, and a short run is averaged over what it has.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float | None) -> None:
        """Take the parameters where they are trained, after `prepare`."""
        self.parameters = parameters
        self.average = None if decay is None else EMAModel(parameters, decay=decay)

    def update(self) -> None:
        """Take in the parameters as an optimizer update left them."""
        if self.average is not None:
            self.average.step(self.parameters)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters are their average within this context, and afterwards what they were, to the bit."""
        if self.average is None:
            yield
            return
        trained = [parameter.detach().clone() for parameter in self.parameters]
        self.average.copy_to(self.parameters)
        try:
            yield
        finally:
            for parameter, value in zip(self.parameters, trained, strict=True):
                parameter.data.copy_(value)

    def state_dict(self) -> dict:
        """The average and how many updates are in it."""
        if self.average is None:
            return {}
        return {name: self.average.state_dict()[name] for name in ("optimization_step", "shadow_params")}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a checkpoint."""
        if self.average is not None:
            device = self.parameters[0].device
            self.average.load_state_dict(
                {**state, "shadow_params": [tensor.to(device) for tensor in state["shadow_params"]]}
            )
