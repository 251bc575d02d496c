"""Learning rate, groups of parameters, and what builds the optimizers of `optimizers.py`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mltfr_dist.config import OptimizerConfig
from mltfr_dist.optimizers import OPTIMIZERS
from mltfr_dist.registry import load

Groups = list[dict[str, Any]]
"""Parameters with the options of their own, as torch's optimizers take them."""


def build_optimizer(model: nn.Module, config: OptimizerConfig, *, fused: bool) -> Optimizer:
    """The optimizer that ``config`` names, over what ``model`` trains.

    Args:
        model: Its parameters are stepped.
        config: The name, and the options.
        fused: Whether one kernel may step many tensors, where the optimizer has one.
    """
    build = load(OPTIMIZERS[config.name].path, "mltfr_dist")
    optimizer: Optimizer = build(parameter_groups(model, config.weight_decay), config, fused)
    return optimizer


def build_rows_optimizer(rows: nn.Parameter, config: OptimizerConfig, *, fused: bool) -> Optimizer:
    """The optimizer that ``config`` names, over rows of an item table alone; embeddings do not
    decay.
    """
    build = load(OPTIMIZERS[config.name].path, "mltfr_dist")
    optimizer: Optimizer = build([{"params": [rows], "weight_decay": 0.0}], config, fused)
    return optimizer


def adamw(groups: Groups, config: OptimizerConfig, fused: bool) -> Optimizer:
    """Adam with decoupled weight decay."""
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=fused)


def adam(groups: Groups, config: OptimizerConfig, fused: bool) -> Optimizer:
    """Adam; weight decay is added to the gradient."""
    return torch.optim.Adam(groups, lr=config.learning_rate, betas=config.betas, fused=fused)


def sgd(groups: Groups, config: OptimizerConfig, fused: bool) -> Optimizer:
    """Gradient descent with momentum; weight decay is added to the gradient."""
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=fused)


def parameter_groups(model: nn.Module, weight_decay: float) -> Groups:
    """Matrices with decay; biases, norms, embeddings and temperatures without."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]

    def decays(p: Tensor) -> bool:
        return p.ndim > 1 and id(p) not in embeddings

    groups = [
        {"params": [p for p in trained if decays(p)], "weight_decay": weight_decay},
        {"params": [p for p in trained if not decays(p)], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of step number ``step`` (from 0): a function, so no state can be lost."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
