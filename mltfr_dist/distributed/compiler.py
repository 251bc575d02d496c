"""torch's compiler is imported only by what compiles: with sympy and all it takes 1.5 s of a
processor, a quarter of a run's start.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from inspect import unwrap
from typing import Any

import torch
from torch.optim import Optimizer

MUON = "deepspeed.runtime.zero.muon.muon_optimizer"
"""An optimizer of DeepSpeed's, for which it looks at each step of ZeRO 1 and 2; a function of it is
compiled as it is imported."""


def leave_out_compiler() -> None:
    """Let optimizers and DeepSpeed's engines be made and stepped without the compiler, where it is
    not there yet. Called before they are.

    torch hides some methods of its optimizers from the compiler, for which it imports that at their
    first call; nothing of ours compiles them. Muon's function is compiled when it is first called.
    """
    for method in vars(Optimizer).values():
        hidden = getattr(method, "__wrapped__", None)
        if hidden is not None:
            vars(hidden).setdefault("__dynamo_disable", hidden)
    if MUON in sys.modules:
        return
    from deepspeed.runtime import compiler

    compiles = compiler.compile
    compiler.compile = lambda *given, **more: at_first_call(lambda: compiles(*given, **more))
    try:
        import_module(MUON)
    except ImportError:  # then DeepSpeed does without it
        pass
    finally:
        compiler.compile = compiles


def step_of(optimizer: Optimizer) -> Callable[[None], float | None]:
    """An optimizer's step as its class defines it, without gradients. torch puts breaks in the
    compiler's graph around it, for which it imports that, and hooks, of which we have none.
    """
    step = unwrap(type(optimizer).step)

    def update(closure: None) -> float | None:
        with torch.set_grad_enabled(bool(optimizer.defaults.get("differentiable"))):
            found: float | None = step(optimizer, closure)
            return found

    return update


Function = Callable[..., Any]


def at_first_call(make: Callable[[], Callable[[Function], Function]]) -> Function:
    """The decorator that ``make`` gives, which is asked for it once the function is called."""

    def decorate(function: Function) -> Function:
        made: list[Function] = []

        @wraps(function)
        def called(*given: Any, **more: Any) -> Any:
            if not made:
                made.append(make()(function))
            return made[0](*given, **more)

        return called

    return decorate
