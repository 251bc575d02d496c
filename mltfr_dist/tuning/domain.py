"""The values of one searched field."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator

from mltfr_dist.schema import Count, Section


class Domain(Section):
    """The values of one field: exactly one of these."""

    listed_by: ClassVar[str] = "sweep"

    choices: tuple[Any, ...] = Field((), description="These values.")
    subsets: tuple[Any, ...] = Field(
        (), description="Every choice of at_least or more of these, as a list."
    )
    at_least: Count = Field(1, description="subsets: the smallest number taken.")
    uniform: tuple[float, float] | None = Field(
        None, description="Real numbers from the first to the second."
    )
    log_uniform: tuple[float, float] | None = Field(
        None, description="The same, evenly on a logarithmic scale."
    )
    integers: tuple[int, int] | None = Field(
        None, description="Whole numbers from the first to the second, both included."
    )
    when: dict[str, Any] = Field(
        {},
        description="Fields searched above this one, each with the value, or a list of values, "
        "that it must have for this field to be searched; else this one keeps its base value.",
    )

    @model_validator(mode="after")
    def _is_one(self) -> Domain:
        given = [
            name
            for name in ("choices", "subsets", "uniform", "log_uniform", "integers")
            if getattr(self, name)
        ]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of choices, subsets, uniform, log_uniform, integers (given: "
                f"{given or 'none'})"
            )
        ends = self.uniform or self.log_uniform or self.integers
        if ends and not ends[0] < ends[1]:
            raise ValueError(
                f"the first end of a range must be below the second (given: {list(ends)})"
            )
        if self.log_uniform and self.log_uniform[0] <= 0:
            raise ValueError(f"log_uniform needs ends above 0 (given: {list(self.log_uniform)})")
        if self.subsets and self.at_least > len(self.subsets):
            raise ValueError(
                f"at_least ({self.at_least}) exceeds the number of values ({len(self.subsets)})"
            )
        return self

    @property
    def ends(self) -> tuple[float, float] | None:
        """First and last number of a range; None for choices."""
        return self.uniform or self.log_uniform or self.integers

    def options(self) -> list[Any] | None:
        """All values, where they can be counted."""
        if self.choices:
            return list(self.choices)
        if self.subsets:
            sizes = range(self.at_least, len(self.subsets) + 1)
            return [
                list(some) for size in sizes for some in itertools.combinations(self.subsets, size)
            ]
        if self.integers:
            return list(range(self.integers[0], self.integers[1] + 1))
        return None

    def samples(self) -> list[Any]:
        """Values that stand for all: every option, or a range's ends and a number between them that
        is not round.
        """
        if self.ends is None:
            return self.options() or []
        first, last = self.ends
        return [first, last] if self.integers else [first, last, first + (last - first) / math.pi]

    def applies(self, values: Mapping[str, Any]) -> bool:
        """Whether the field is searched at all where those above it have these values."""
        return all(
            values[key] in (wanted if isinstance(wanted, list) else [wanted])
            for key, wanted in self.when.items()
        )

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is in the domain."""
        if self.ends and not self.integers:
            return isinstance(value, int | float) and self.ends[0] <= value <= self.ends[1]
        return value in (self.options() or [])
