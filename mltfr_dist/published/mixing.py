"""A class with some of its methods as published."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Kind = TypeVar("Kind")


def with_defects(repaired: type[Kind], defects: Sequence[type[Kind]]) -> type[Kind]:
    """``repaired``, of whose methods some are those of ``defects``, each a subclass of it that
    changes one thing.
    """
    return type(repaired.__name__, (*defects, repaired), {}) if defects else repaired
