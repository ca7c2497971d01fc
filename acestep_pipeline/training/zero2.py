"""The optimizer's state under DeepSpeed's ZeRO-2, where each process holds a part of it: put together, and divided."""

from collections.abc import Iterator

import torch
import torch.distributed


class WholeState:
    """Stands in for an optimizer that accelerate prepared for ZeRO-2, with the state that the optimizer had without.

    DeepSpeed keeps the parameters of a group end to end, padded, and each process updates an equal part of them.
    `state_dict` and `load_state_dict` speak of whole parameters, so that a checkpoint is the same under any launcher.
    """

    def __init__(self, optimizer) -> None:
        """Take accelerate's `DeepSpeedOptimizerWrapper`."""
        self.optimizer = optimizer
        self._gathered: dict | None = None

    @property
    def param_groups(self) -> list[dict]:
        """Those of the optimizer, with its learning rates."""
        return self.optimizer.param_groups

    def step(self) -> None:
        """Nothing: the engine has done it (`ZeRO2.finish_gradients`)."""

    def zero_grad(self) -> None:
        """Nothing, as well."""

    def gather(self) -> None:
        """Put the state together, for `state_dict` on one of the processes; call it on all of them."""
        zero, state, groups, start = self.optimizer.optimizer, {}, [], 0
        for part, parameters, group in zip(*_parts(zero), zero.param_groups, strict=True):
            for name, value in zero.optimizer.state.get(part, {}).items():
                for index, whole in enumerate(_wholes(value, part, parameters), start=start):
                    state.setdefault(index, {})[name] = whole
            groups.append(group | {"params": list(range(start, start + len(parameters)))})
            start += len(parameters)
        self._gathered = {"state": state, "param_groups": groups}

    def state_dict(self) -> dict:
        """What `gather` put together, in the form of torch's optimizers."""
        gathered, self._gathered = self._gathered, None
        return gathered

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Take over this process's part of a whole state, and of the parameters as they are now."""
        zero, start = self.optimizer.optimizer, 0
        zero.refresh_fp32_params()
        for part, parameters, group, saved in zip(
            *_parts(zero), zero.param_groups, state["param_groups"], strict=True
        ):
            group.update({name: value for name, value in saved.items() if name != "params"})
            of_group = [state["state"].get(start + index, {}) for index in range(len(parameters))]
            start += len(parameters)
            for name, first in of_group[0].items():
                if first.shape == parameters[0].shape:
                    value = torch.zeros_like(part)
                    for parameter, values in zip(parameters, of_group, strict=True):
                        for mine, whole in _overlap(parameter):
                            value[mine] = values[name].to(part.device).flatten()[whole]
                else:
                    value = first.clone()
                zero.optimizer.state[part][name] = value


def _parts(zero) -> tuple[list[torch.Tensor], list[list[torch.nn.Parameter]]]:
    """For each group: this process's part of its parameters, and these."""
    return zero.single_partition_of_fp32_groups, zero.bit16_groups


def _overlap(parameter: torch.nn.Parameter) -> Iterator[tuple[slice, slice]]:
    """Where in this process's part some of `parameter` lies, and which of its elements; nothing if none does."""
    mapping = parameter._hp_mapping
    if mapping is not None:
        mine, whole = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
        yield slice(mine.start, mine.start + mine.numel), slice(whole.start, whole.start + whole.numel)


def _wholes(value: torch.Tensor, part: torch.Tensor, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """A value of the state for each whole parameter, on the CPU; one that is no element's own is the same for all."""
    if value.shape != part.shape:
        return [value.cpu().clone() for _ in parameters]
    flats = torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=value.dtype, device=value.device)
    wholes = flats.split([parameter.numel() for parameter in parameters])
    for parameter, flat in zip(parameters, wholes, strict=True):
        for mine, whole in _overlap(parameter):
            flat[whole] = value[mine]
    torch.distributed.all_reduce(flats)
    return [flat.view_as(parameter).cpu() for flat, parameter in zip(wholes, parameters, strict=True)]
