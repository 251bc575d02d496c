"""Whole tensors in and out of a sharded engine: the same names and shapes at any ZeRO stage and
world size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mltfr_dist.distributed.engine import Engine
from mltfr_dist.distributed.row_adam import RowAdam
from mltfr_dist.models.item_rows import ItemRows

State = dict[str, Tensor]


def whole_parameters(engine: Engine) -> State:
    """Every trained parameter in fp32 and every persistent buffer, on the CPU of every rank. All
    ranks must call.

    Copies, except for a table that is stepped by rows, which may be as large as all memory that is
    left.
    """
    return {
        name: whole_parameter(engine, p) for name, p in trained_parameters(engine)
    } | persistent_buffers(engine.module)


def trained_parameters(engine: Engine) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters without the frozen ones, which are token tables and no part of the
    state.
    """
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def persistent_buffers(module: nn.Module) -> State:
    """Name to tensor of the buffers that belong to the state."""
    parameters = {name for name, _ in module.named_parameters()}
    buffers = {name for name, _ in module.named_buffers()} - parameters
    tables = {m.weight.data_ptr() for m in module.modules() if isinstance(m, ItemRows)}
    tensors = {name: t.detach() for name, t in module.state_dict().items() if name in buffers}
    return {
        name: t.cpu() if t.data_ptr() in tables else t.cpu().clone() for name, t in tensors.items()
    }


def whole_optimizer_state(engine: Engine) -> State:
    """What the optimizer keeps, as ``parameter/entry``, on the CPU of every rank. All ranks must
    call.

    Those of a table that is stepped by rows are whole on rank 0 alone; those of a divided one are
    not among them.
    """
    link_optimizer_state(engine)
    state = {
        f"{name}/{key}": _whole(engine, p, key)
        for name, p in trained_parameters(engine)
        for key in engine.optimizer_state
    }
    rows = engine.row_adam
    if isinstance(rows, RowAdam):
        state |= {f"{rows.name}/{key}": rows.whole(key) for key in rows.moments}
    return state


def whole_parameter(engine: Engine, parameter: Tensor) -> Tensor:
    """One parameter (or buffer) in fp32 on the CPU of every rank. All ranks must call."""
    return (
        _whole(engine, parameter, None)
        if isinstance(parameter, nn.Parameter)
        else parameter.detach().float().cpu()
    )


def _whole(engine: Engine, parameter: nn.Parameter, key: str | None) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_stage == 0:
        value = parameter.detach() if key is None else engine.optimizer.state[parameter][key]
    elif key is None:
        value = safe_get_full_fp32_param(parameter)
    else:
        value = safe_get_full_optimizer_state(parameter, key)
    # fp32 master copies, always: what bf16 rounds away is part of the state.
    shape = getattr(parameter, "ds_shape", parameter.shape)  # stage 3 leaves an empty shell
    return value.detach().float().cpu().clone().reshape(shape)


def _set_whole(engine: Engine, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
    """Set this rank's part of a parameter's fp32 master, or of its optimizer state, from the
    whole.
    """
    from deepspeed import utils

    value = value.to(engine.ranks.device)
    if engine.zero_stage == 0:
        (parameter if key is None else engine.optimizer.state[parameter][key]).copy_(value)
    elif engine.zero_stage == 3:
        # DeepSpeed's own setter of whole tensors fails where ranks do not divide the size: the last
        # part is padded.
        local = (
            utils.safe_get_local_fp32_param(parameter)
            if key is None
            else utils.safe_get_local_optimizer_state(parameter, key)
        )
        padded = value.new_zeros(local.numel() * engine.ranks.world_size)
        padded[: value.numel()] = value.flatten()
        own = padded[local.numel() * engine.ranks.rank :][: local.numel()]
        if key is None:
            utils.safe_set_local_fp32_param(parameter, own)
        else:
            utils.safe_set_local_optimizer_state(parameter, own, key)
    elif key is None:
        utils.safe_set_full_fp32_param(parameter, value)
    else:
        utils.safe_set_full_optimizer_state(parameter, value, key)


@torch.no_grad()
def restore_masters(engine: Engine, parameters: State) -> None:
    """Set the fp32 masters, which a bf16 module has rounded. The module itself must already hold
    ``parameters``.
    """
    for name, p in trained_parameters(engine):
        _set_whole(engine, p, None, parameters[name])


@torch.no_grad()
def restore_optimizer_state(engine: Engine, state: State, num_updates: int) -> None:
    """Set what the optimizer keeps and its number of updates. All ranks must call."""
    begin_optimizer_state(engine, num_updates)
    link_optimizer_state(engine)
    for name, p in trained_parameters(engine):
        for key in engine.optimizer_state:
            _set_whole(engine, p, key, state[f"{name}/{key}"])
    if isinstance(rows := engine.row_adam, RowAdam):
        for key in rows.moments:
            whole = state.get(f"{rows.name}/{key}")  # written divided, they come some at a time
            if whole is not None:
                rows.restore(key, torch.arange(len(whole)), whole)


def begin_optimizer_state(engine: Engine, num_updates: int = 0) -> None:
    """Set what the optimizer keeps to zero, as before the first update."""
    inner = engine.optimizer if engine.zero_stage == 0 else engine.optimizer.optimizer
    for tensor in _optimizer_tensors(engine):
        on_device = inner.defaults.get("fused") or inner.defaults.get("capturable")
        inner.state[tensor] = {key: torch.zeros_like(tensor) for key in engine.optimizer_state} | {
            "step": torch.tensor(float(num_updates), device=tensor.device if on_device else "cpu")
        }
    if engine.row_adam is not None:
        engine.row_adam.begin(num_updates)


def link_optimizer_state(engine: Engine) -> None:
    """Tell stages 1 and 2 which part of the flat optimizer state is whose.

    DeepSpeed 0.19 does so once, after the first parameter group's first step: the other groups have
    no state yet and are never linked.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    if engine.zero_stage in (1, 2):
        zero = engine.optimizer
        for group, flat in zip(
            zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True
        ):
            lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)


def _optimizer_tensors(engine: Engine) -> list[Tensor]:
    """The tensors that the optimizer itself steps: parameters, or this rank's flat fp32
    partitions.
    """
    if engine.zero_stage == 0:
        return [p for group in engine.optimizer.param_groups for p in group["params"]]
    if engine.zero_stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return list(engine.optimizer.single_partition_of_fp32_groups)
