"""What the lines of the registries name: `module:name`, imported once it is needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def load(path: str, package: str) -> Any:
    """What ``path``, a ``module:name`` under ``package``, stands for.

    Args:
        path: such as "sasrec:SASRec".
        package: such as "mltfr_dist.models".
    """
    module, _, name = path.partition(":")
    return getattr(import_module(f"{package}.{module}"), name)
