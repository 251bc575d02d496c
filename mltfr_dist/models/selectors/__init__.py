"""What an expert reads of its table; `mltfr_dist/selectors.py` has the names of the strategies."""

from __future__ import annotations

from importlib import import_module

from mltfr_dist.models.selectors.base import Reduce, Selection, Selector
from mltfr_dist.selectors import SELECTORS

__all__ = ["Reduce", "Selection", "Selector", "selector_class"]


def selector_class(name: str) -> type[Selector]:
    """The class that the registry names."""
    module, _, class_name = SELECTORS[name].path.partition(":")
    found: type[Selector] = getattr(
        import_module(f"mltfr_dist.models.selectors.{module}"), class_name
    )
    return found
