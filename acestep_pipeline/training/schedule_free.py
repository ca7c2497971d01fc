"""Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682) that comes back from evaluation to the bit."""

import schedulefree
import torch


class AdamWScheduleFree(schedulefree.AdamWScheduleFree):
    """`schedulefree.AdamWScheduleFree` whose `eval()` sets the point of training aside instead of computing it back.

    The gradient is taken at y, the average x is what is used, and x = y + (1 - 1/beta1)(z - y). The library goes to x
    and back by that formula, which rounds: how often a run was checkpointed would show in its result. Here y itself is
    kept in the state, under `y`, while the parameters are x, so that a checkpoint written then has all three.
    """

    @torch.no_grad()
    def eval(self) -> None:
        """Set the parameters to x, the average that is evaluated, saved and used."""
        for group in self.param_groups:
            if group["train_mode"]:
                for parameter in group["params"]:
                    state = self.state[parameter]
                    if "z" in state:
                        state["y"] = parameter.detach().clone()
        super().eval()

    @torch.no_grad()
    def train(self) -> None:
        """Set the parameters to y, where the next gradient is taken."""
        super().train()
        for group in self.param_groups:
            for parameter in group["params"]:
                y = self.state[parameter].pop("y", None)
                if y is not None:
                    parameter.copy_(y)
