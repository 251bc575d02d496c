"""Keeps torch's compiler out of a process that compiles nothing: its import is a third of a start.

torch imports `torch._dynamo` at an optimizer's first calls, to tell it to leave them alone.
DeepSpeed decorates its Muon optimizer with `torch.compile`, which imports `torch._inductor` as
well, and imports Muon only to learn whether an optimizer is it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from types import FunctionType

import torch
from torch.optim import Optimizer

COMPILER = "torch._dynamo"
NOT_COMPILED = "__dynamo_disable"
"""Where `torch._compile` keeps what is called in place of a function that is not to be compiled."""


def leave_compiler_out() -> None:
    """Do so for all that follows; nothing where the program has imported the compiler itself."""
    if COMPILER in sys.modules:
        return
    for method in vars(Optimizer).values():
        plain = getattr(method, "__wrapped__", None)
        if isinstance(plain, FunctionType) and not hasattr(plain, NOT_COMPILED):
            setattr(plain, NOT_COMPILED, plain)
    _import_muon()


def plain_step(optimizer: Optimizer) -> Callable[..., float | None]:
    """The ``step`` of one of torch's optimizers, without what torch wraps it in: hooks, of which
    there are none here, and marks for the compiler.
    """
    if COMPILER in sys.modules or not type(optimizer).__module__.startswith("torch.optim"):
        return optimizer.step
    return torch.no_grad()(partial(inspect.unwrap(type(optimizer).step), optimizer))


def _import_muon() -> None:
    """Import it as DeepSpeed does where torch has no compiler."""
    from deepspeed.runtime import compiler

    usual = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    except ImportError:  # as DeepSpeed takes it
        pass
    finally:
        compiler.compile = usual
