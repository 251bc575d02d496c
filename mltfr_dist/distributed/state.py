"""Whole tensors in and out of a sharded engine: the same names and shapes at any ZeRO stage and world size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mltfr_dist.distributed.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's state per parameter."""

State = dict[str, Tensor]


def whole_parameters(engine: Engine) -> State:
    """Every parameter in fp32 and every persistent buffer, on the CPU of every rank. All ranks must call."""
    return {name: whole_parameter(engine, p) for name, p in engine.module.named_parameters()} | persistent_buffers(engine.module)


def persistent_buffers(module: nn.Module) -> State:
    """Name to tensor of the buffers that belong to the state."""
    parameters = {name for name, _ in module.named_parameters()}
    buffers = {name for name, _ in module.named_buffers()} - parameters
    return {name: t.detach().cpu().clone() for name, t in module.state_dict().items() if name in buffers}


def whole_moments(engine: Engine) -> State:
    """Adam's moments, as ``name/exp_avg`` and ``name/exp_avg_sq``, on the CPU of every rank. All ranks must call."""
    link_moments(engine)
    return {f"{name}/{key}": _whole(engine, p, key) for name, p in engine.module.named_parameters() for key in MOMENTS}


def whole_parameter(engine: Engine, parameter: Tensor) -> Tensor:
    """One parameter (or buffer) in fp32 on the CPU of every rank. All ranks must call."""
    return _whole(engine, parameter, None) if isinstance(parameter, nn.Parameter) else parameter.detach().float().cpu()


def _whole(engine: Engine, parameter: nn.Parameter, key: str | None) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_stage == 0:
        value = parameter.detach() if key is None else engine.optimizer.state[parameter][key]
    elif key is None:
        value = safe_get_full_fp32_param(parameter)
    else:
        value = safe_get_full_optimizer_state(parameter, key)
    # fp32 master copies, always: what bf16 rounds away is part of the state.
    return value.detach().float().cpu().clone().reshape(parameter.ds_shape if engine.zero_stage == 3 else parameter.shape)


@torch.no_grad()
def restore_masters(engine: Engine, parameters: State) -> None:
    """Set the fp32 masters, which a bf16 module has rounded. The module itself must already hold ``parameters``."""
    from deepspeed.utils import safe_set_full_fp32_param

    if engine.zero_stage:
        for name, p in engine.module.named_parameters():
            safe_set_full_fp32_param(p, parameters[name].to(engine.ranks.device))


@torch.no_grad()
def restore_moments(engine: Engine, moments: State, num_updates: int) -> None:
    """Set Adam's moments and its number of updates. All ranks must call."""
    from deepspeed.utils import safe_set_full_optimizer_state

    inner = engine.optimizer if engine.zero_stage == 0 else engine.optimizer.optimizer
    for part in _optimizer_tensors(engine):
        on_device = inner.defaults.get("fused") or inner.defaults.get("capturable")
        inner.state[part] = {key: torch.zeros_like(part) for key in MOMENTS} | {
            "step": torch.tensor(float(num_updates), device=part.device if on_device else "cpu")
        }
    link_moments(engine)
    for name, p in engine.module.named_parameters():
        for key in MOMENTS:
            value = moments[f"{name}/{key}"].to(engine.ranks.device)
            if engine.zero_stage == 0:
                inner.state[p][key].copy_(value)
            else:
                safe_set_full_optimizer_state(p, value, key)


def link_moments(engine: Engine) -> None:
    """Tell stages 1 and 2 which part of the flat moments is whose.

    DeepSpeed 0.19 does so once, after the first parameter group's first step: the other groups have no moments yet and
    are never linked.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    if engine.zero_stage in (1, 2):
        zero = engine.optimizer
        for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)


def _optimizer_tensors(engine: Engine) -> list[Tensor]:
    """The tensors that the optimizer itself steps: parameters, or this rank's flat fp32 partitions."""
    if engine.zero_stage == 0:
        return [p for group in engine.optimizer.param_groups for p in group["params"]]
    if engine.zero_stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return list(engine.optimizer.single_partition_of_fp32_groups)
