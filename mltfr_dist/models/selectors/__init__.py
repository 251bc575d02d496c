"""What an expert reads of its table; `mltfr_dist/selectors.py` has the names of the strategies."""

from __future__ import annotations

from mltfr_dist.models.selectors.base import Queries, Reduce, Selection, Selector
from mltfr_dist.registry import load
from mltfr_dist.selectors import SELECTORS

__all__ = ["Queries", "Reduce", "Selection", "Selector", "selector_class"]


def selector_class(name: str) -> type[Selector]:
    """The class that the registry names."""
    selector: type[Selector] = load(SELECTORS[name].path, "mltfr_dist.models.selectors")
    return selector
