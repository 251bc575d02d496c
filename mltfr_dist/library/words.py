"""Messages in the words of a call: commands say `--user-column`, functions `user_column`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args, get_origin

from mltfr_dist.config import PrepareConfig, PrepareResources, TableConfig
from mltfr_dist.data.sources.formats import FORMATS
from mltfr_dist.errors import ConfigError, MltfrError

_FIELDS = {
    name: field.annotation
    for section in (PrepareConfig, PrepareResources, TableConfig)
    for name, field in section.model_fields.items()
}
_TEXTS = ("name", "packages", "output")
_SWITCHES = ("download",)
_OPTION = re.compile(r"--([a-z][a-z-]*)(?:[ =]('[^']*'|(?!-)[\w./%+-]+))?")
_NO_VALUES = (
    *("a", "and", "cannot", "for", "holds", "in", "is", "lies", "or", "out", "than", "that"),
    *("to", "was", "where", "with"),
)
"""Words that may follow the name of an option in a sentence."""
_COMMANDS = {
    r"`mltfr prepare`": "`prepare`",
    r"`mltfr tables`": "`build_table`",
    r"`mltfr export`": "`export`",
    r"`--resume auto`": "`resume=True`",
    r"`(?:mltfr|python)[^`]*? --config ([^`]*)`": r"`fit('\1')`",
    r"([Ss])tart the same command again": r"\1tart the same call again",
    r"the same command goes on": "the same call goes on",
}


@contextmanager
def words_of_a_call() -> Iterator[None]:
    """Let errors for users name parameters in place of options.

    Raises:
        MltfrError: The same one, in other words.
    """
    try:
        yield
    except MltfrError as error:
        error.what, error.rule, error.remedy = map(as_call, (error.what, error.rule, error.remedy))
        error.args = (
            " ".join(sentence for sentence in (error.what, error.rule, error.remedy) if sentence),
        )
        raise


def as_call(text: str) -> str:
    """``text`` with parameters in place of options, and functions in place of commands."""
    for pattern, by in _COMMANDS.items():
        text = re.sub(pattern, by, text)
    pieces = text.split("`")
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            pieces[index] = _OPTION.sub(lambda match: _parameter(match, "`"), piece)
        elif piece.startswith("--"):  # no command
            pieces[index] = _OPTION.sub(lambda match: _parameter(match, ""), piece)
    return "`".join(pieces)


def _parameter(match: re.Match[str], mark: str) -> str:
    """`--missing drop` -> `missing='drop'`; what is no option of these functions stays."""
    typed, value = match[1], match[2] or ""
    name, after = typed.replace("-", "_"), match[0][2 + len(typed) :]
    if name.startswith("no_") and _FIELDS.get(name[3:]) is bool:
        return f"{mark}{name[3:]}=False{mark}{after}"
    if _FIELDS.get(name) is bool or name in _SWITCHES:
        return f"{mark}{name}=True{mark}{after}"
    if name not in _FIELDS and name not in _TEXTS:
        return match[0]
    end = "." if value.endswith(".") else ""
    bare = value.removesuffix(".").strip("'")
    if not _is_value(name, bare, is_quoted=value[:1] == "'"):
        return f"{mark}{name}{mark}{after}"
    literal = bare if _FIELDS.get(name) is int and bare.isdecimal() else repr(bare)
    if get_origin(_FIELDS.get(name)) is tuple:
        literal = f"({literal},)"
    return f"{mark}{name}={literal}{mark}{end}"


def _is_value(name: str, word: str, *, is_quoted: bool) -> bool:
    """Whether ``word``, which follows an option in a sentence, is a value that it is given."""
    kind = _FIELDS.get(name)
    if get_origin(kind) is Literal:
        return word in get_args(kind)
    if name == "format":
        return word in FORMATS
    return is_quoted or bool(word and word not in _NO_VALUES)


def path_text(value: object, what: str) -> str:
    """A path, or a name, as text.

    Raises:
        ConfigError: It is something else.
    """
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(
            f"{what} is {value!r:.80}, of type {type(value).__name__}.",
            rule=f"{what} is a text or a path.",
            remedy="Give its name.",
        )
    return os.fspath(value)
