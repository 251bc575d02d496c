"""Fields of the configuration as options of a command line, and as its help shows them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mltfr_dist.cli.screen import show
from mltfr_dist.schema import Known, Section, validate


def type_text(field: FieldInfo) -> str:
    """A field's type as a user writes it, with its bounds."""
    rules = (getattr(m, "func", None) for m in field.metadata)
    names = [name for rule in rules if isinstance(rule, Known) for name in rule.names]
    choices = names or _choices(field.annotation)
    if choices:
        return " | ".join(choices)
    bounds = [
        f"{symbol}{getattr(m, name)}"
        for m in _metadata(field)
        for name, symbol in _BOUNDS
        if hasattr(m, name)
    ]
    options = [_type_name(a) for a in _options(field.annotation)]
    return ", ".join([" or ".join(options), *dict.fromkeys(bounds)])


_BOUNDS = (("gt", "> "), ("ge", ">= "), ("lt", "< "), ("le", "<= "))


def _metadata(field: FieldInfo) -> list[Any]:
    metadata = list(field.metadata)
    for option in get_args(field.annotation):
        metadata += [
            m
            for info in getattr(option, "__metadata__", ())
            for m in getattr(info, "metadata", [info])
        ]
    return metadata


def _options(annotation: Any) -> list[Any]:
    return (
        list(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else [annotation]
    )


def _type_name(annotation: Any) -> str:
    if annotation is NoneType:
        return "null"
    if get_origin(annotation) is tuple:
        return "list of " + _type_name(get_args(annotation)[0])
    if hasattr(annotation, "__metadata__"):
        return _type_name(annotation.__origin__)
    choices = _choices(annotation)
    return (
        " | ".join(choices) if choices else getattr(annotation, "__name__", str(annotation)).lower()
    )


def _choices(annotation: Any) -> list[str]:
    return [str(a) for a in get_args(annotation) if isinstance(a, str)]


def default_text(field: FieldInfo) -> str:
    """A field's default as a user writes it."""
    if field.default is PydanticUndefined:
        return "required"
    value = field.default
    if isinstance(value, Path):
        value = str(value)
    return json.dumps(value)


class FormatAction(argparse.Action):
    """`--format NAME`; `--format help` lists the names."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Keep the name, or print the list and exit."""
        if values == "help":
            from mltfr_dist.data.sources.layouts import format_help

            show(format_help().rstrip("\n"))
            parser.exit()
        setattr(namespace, self.dest, values)


def add_section(
    parser: argparse.ArgumentParser,
    model: type[Section],
    actions: dict[str, type[argparse.Action]] | None = None,
) -> None:
    """One option for each field of a flat section; ``actions`` are those of single fields."""
    for name, field in model.model_fields.items():
        options: dict[str, Any] = {
            "help": f"{field.description} ({type_text(field)}; default: {default_text(field)})"
        }
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(field.annotation) is tuple:
            options["action"] = "append"
        elif name in (actions or {}):
            options["action"] = (actions or {})[name]
        if field.annotation is not bool:
            options["metavar"] = name.rpartition("_")[2].upper()
        parser.add_argument(
            "--" + name.replace("_", "-"),
            default=None,
            **{k: _escape(v) for k, v in options.items()},
        )


def _escape(value: Any) -> Any:
    return value.replace("%", "%%") if isinstance(value, str) else value


def section_from(model: type[Section], options: argparse.Namespace) -> Any:
    """The section that the given options describe."""
    given = {
        name: getattr(options, name)
        for name in model.model_fields
        if getattr(options, name) is not None
    }
    return validate(model, given, source="the command line")
