"""What every configuration is made of: immutable sections, and errors that name path, value, rule
and nearest key.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from mltfr_dist.errors import ConfigError
from mltfr_dist.invocation import command

Probability = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Base of every configuration section: immutable, and unknown keys are refused."""

    listed_by: ClassVar[str] = "train"
    """The command whose help lists every field with its default and unit."""

    @classmethod
    def moved(cls, fields: Mapping[str, Any]) -> list[str]:
        """What is said of ``fields`` of older releases, dotted key to value; of others nothing."""
        return []

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _no_boolean_numbers(cls, values: Any) -> Any:
        """`epochs: true` is a slip, and would count as 1."""
        for name, value in values.items() if isinstance(values, dict) else ():
            if (
                isinstance(value, bool)
                and name in cls.model_fields
                and cls.model_fields[name].annotation is not bool
            ):
                raise ValueError(f"{name} must not be true or false (given: {value})")
        return values


@dataclass(frozen=True)
class Known:
    """A name must be one of ``names``, which are of a ``kind`` such as "backbones"."""

    names: Collection[str]
    kind: str

    def __call__(self, name: str) -> str:
        """The name as it is."""
        if name not in self.names:
            listed = ", ".join(self.names)
            raise ValueError(f"{self.kind} are {listed}{or_nearest(name, self.names)}")
        return name


def known(registry: Collection[str], kind: str) -> AfterValidator:
    """The validator of a field that takes a name of ``registry``: see :class:`Known`."""
    return AfterValidator(Known(registry, kind))


class Options(Section):
    """A section whose fields are options of a command, and are called so in errors:
    `--user-core`.
    """

    @staticmethod
    def option(field: str) -> str:
        """The option that sets ``field``."""
        return "--" + field.replace("_", "-")


SectionT = TypeVar("SectionT", bound=Section)


def validate(model: type[SectionT], values: dict[str, Any], *, source: str) -> SectionT:
    """Build ``model`` from plain ``values``.

    Raises:
        ConfigError: naming every offending path, its value, the rule, and for an unknown key the
            nearest valid one.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems, wrong = [], []
        former = _former(model, error)
        for item in error.errors():
            path = ".".join(str(name) for name in item["loc"]) or "(whole configuration)"
            if issubclass(model, Options) and path in model.model_fields:
                path = model.option(path)
            if path in former:
                continue
            if item["type"] == "extra_forbidden":
                near = nearest_key(path, field_paths(model))
                wrong.append(near or path)
                problems.append(
                    f"`{path}` is not a field" + (f"; the nearest is `{near}`" if near else "")
                )
            elif item["type"] == "missing":
                problems.append(f"`{path}` is required and was not given")
            else:
                given = (
                    ""
                    if isinstance(item["input"], dict | Section)
                    else f" (given: {item['input']!r})"
                )
                wrong.append(path)
                problems.append(f"`{path}`: {item['msg'].removeprefix('Value error, ')}{given}")
        problems += model.moved(former)
        raise ConfigError(
            f"The configuration from {source} is not valid: {'; '.join(problems)}.",
            remedy=f"Correct it{KEPT if former else ''}; `{command(model.listed_by)} "
            f"--help{_topic(model, wrong)}` lists the "
            "fields with their defaults and units.",
        ) from None


KEPT = (
    " (leave out switches of what the run does not have; a run that was begun goes on once its "
    "config.yaml is changed so, with the same numbers)"
)
"""What is said where fields have moved."""


def _former(model: type[Section], error: ValidationError) -> dict[str, Any]:
    """Fields of older releases that ``error`` refuses, dotted key to value."""
    unknown = {
        ".".join(str(name) for name in item["loc"]): item["input"]
        for item in error.errors()
        if item["type"] == "extra_forbidden"
    }
    return {path: value for path, value in unknown.items() if model.moved({path: value})}


def changed(config: SectionT, fields: Mapping[str, Any], *, source: str) -> SectionT:
    """``config`` with dotted ``fields`` changed, such as ``{"training.epochs": 3}``, validated
    anew.

    Args:
        config: As it is.
        fields: New values by dotted key.
        source: Who changes them, for messages.

    Raises:
        ConfigError: The result is not valid.
    """
    # Of options, which ones were given counts, and not only their values.
    values = config.model_dump(mode="json", exclude_unset=isinstance(config, Options))
    for path, value in fields.items():
        *sections, name = path.split(".")
        section = values
        for key in sections:
            section = section[key]
        section[name] = value
    return validate(type(config), values, source=source)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys to nested mappings: ``{"a.b": 1}`` to ``{"a": {"b": 1}}``."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        *sections, leaf = key.split(".")
        node = result
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return result


def _topic(model: type[Section], paths: list[str]) -> str:
    """What follows `--help` to list the fields around ``paths``, where the command takes it."""
    if model.listed_by not in ("train", "sweep"):
        return ""
    sections = {_section_of(model, path) for path in paths}
    return f" {sections.pop()}" if len(sections) == 1 and "" not in sections else " all"


def _section_of(model: type[Section], path: str) -> str:
    """The innermost section of a path, which may go on into values: `mltfr.tables.0` is in
    `mltfr`.
    """
    while path and section_at(model, path) is None:
        path = path.rpartition(".")[0]
    return path


def field_paths(model: type[Section], prefix: str = "") -> list[str]:
    """Every dotted key of ``model``, sections included."""
    paths = []
    for name, field in model.model_fields.items():
        paths.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            paths += field_paths(field.annotation, f"{prefix}{name}.")
    return paths


def value_at(config: Section, path: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def field_at(model: type[Section], path: str) -> FieldInfo | None:
    """The field of a dotted key; None where there is none."""
    name, _, rest = path.partition(".")
    field = model.model_fields.get(name)
    if field is None or not rest:
        return field
    inner = section_at(model, name)
    return field_at(inner, rest) if inner else None


def section_at(model: type[Section], path: str) -> type[Section] | None:
    """The section of a dotted key; None where it is a plain field, or nothing."""
    field = field_at(model, path)
    inner = field.annotation if field else None
    return inner if isinstance(inner, type) and issubclass(inner, Section) else None


def nearest_key(path: str, valid: list[str]) -> str | None:
    """The valid dotted key most like ``path``: by the whole path, or by its last part alone."""
    leaf = path.rpartition(".")[2]
    same_leaf = [key for key in valid if key.rpartition(".")[2] == leaf]
    if same_leaf:
        return same_leaf[0]
    by_path = difflib.get_close_matches(path, valid, n=1, cutoff=0.6)
    if by_path:
        return by_path[0]
    by_leaf = difflib.get_close_matches(
        leaf, [key.rpartition(".")[2] for key in valid], n=1, cutoff=0.6
    )
    return next((key for key in valid if by_leaf and key.rpartition(".")[2] == by_leaf[0]), None)


def or_nearest(name: str, valid: Collection[str]) -> str:
    """What follows a name that is none of ``valid``: `; the nearest is ...`, or nothing."""
    near = nearest_key(name, list(valid))
    return f"; the nearest is `{near}`" if near else ""
