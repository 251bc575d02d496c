"""Versioned JSON headers: the file of a folder that says what the others are."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, TypeVar

from pydantic import BaseModel

from mltfr_dist.errors import MltfrError

T = TypeVar("T", bound=BaseModel)


def parse_header(
    content: str | bytes,
    schema: type[T],
    versions: Collection[int],
    *,
    what: object,
    remedy: str,
    error: type[MltfrError],
) -> tuple[T, dict[str, Any]]:
    """A header, checked, and the values as they stand in the file.

    Args:
        content: JSON.
        schema: Model of the values.
        versions: Values of ``schema_version`` that can be read.
        what: Name of the header in errors.
        remedy: What to do about another version.
        error: What another version raises.

    Raises:
        MltfrError: ``error``, for another version.
        ValueError: Not a JSON object, or not of the schema; the caller says what that means.
        RecursionError: Nested too deeply.
    """
    values = json.loads(content)
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    version = values.get("schema_version")
    if version not in versions:
        raise error(
            f"{what} has schema version {version}; this program reads "
            f"{', '.join(map(str, versions))}.",
            remedy=remedy,
        )
    return schema.model_validate(values), values
