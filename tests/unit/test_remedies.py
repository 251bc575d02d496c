"""What an error tells the user to type can be typed: every command, option and key that a message
names exists.
"""

from __future__ import annotations

import argparse
import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from mltfr_dist.cli import build_parser
from mltfr_dist.config import PrepareConfig, PrepareResources, RunConfig, TableConfig
from mltfr_dist.errors import ConfigError
from mltfr_dist.resolve import resolve_config
from mltfr_dist.schema import Options, field_paths, validate
from mltfr_dist.tuning.space import SweepConfig

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mltfr_dist"
COMMAND_SECTIONS: tuple[type[Options], ...] = (PrepareConfig, PrepareResources, TableConfig)
LAUNCHERS = {
    "--num_gpus",
    "--master_port",
    "--ntasks-per-node",
    "--gpus-per-node",
    "--gpus-per-task",
    "--no-deps",
    "--target",
}
"""Options of deepspeed, torchrun, srun and pip."""


class Text(NamedTuple):
    """What a message says; {…} stands for a value that is only known when it is raised."""

    place: str
    text: str


def blocks(node: ast.AST) -> Iterator[str]:
    """The alternatives of an expression that makes a text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        values = (v.value if isinstance(v, ast.Constant) else "{…}" for v in node.values)
        yield "".join(str(value) for value in values)
    elif isinstance(node, ast.IfExp):
        yield from blocks(node.body)
        yield from blocks(node.orelse)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from (left + right for left in blocks(node.left) for right in blocks(node.right))
    elif isinstance(node, ast.Dict):
        for value in node.values:
            yield from blocks(value)
    else:
        yield "{…}"


def texts() -> list[Text]:
    """What every error of the package says, and every constant that is named as a remedy."""
    result = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg in ("rule", "remedy"):
                value: ast.AST = node.value
            elif (
                isinstance(node, ast.Call)
                and node.args
                and ast.unparse(node.func).endswith("Error")
            ):
                value = node.args[0]
            elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
                if not any(
                    re.search("remed|rebuild|advice", name, re.IGNORECASE) for name in names
                ):
                    continue
                value = node.value
            else:
                continue
            place = f"{path.relative_to(PACKAGE)}:{value.lineno}"
            result += [Text(place, text) for text in blocks(value) if text != "{…}"]
    return result


TEXTS = texts()


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def commands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return dict(action.choices)


def test_there_are_messages_to_check() -> None:
    assert len(TEXTS) > 300


def test_options_exist() -> None:
    known = LAUNCHERS | set(re.findall(r'"(--[a-z_-]+)"', (ROOT / "train.py").read_text()))
    for parser in commands().values():
        known |= options_of(parser)
    wrong = {
        f"{place}: {option}"
        for place, text in TEXTS
        for option in re.findall(r"(?<![\w-])--[a-z][a-z_-]+", text)
        if option not in known
    }
    assert not wrong, "\n".join(["", *sorted(wrong)])


def test_fields_of_a_command_are_named_as_options() -> None:
    """`tensor=NAME` or `user_column` cannot be typed; `--tensor NAME` and `--user-column` can."""
    fields = {name for section in COMMAND_SECTIONS for name in section.model_fields}
    words = "|".join(sorted(name for name in fields if "_" in name))
    assignments = "|".join(sorted(fields))
    wrong = {
        f"{place}: {result}"
        for place, text in TEXTS
        for result in re.findall(
            rf"(?<![\w.-])(?:(?:{assignments})=\w+|(?:{words})(?![\w.-]))", text
        )
        # `training.global_batch_size` and its like are keys of a run, with a dot before.
        if not place.startswith(("training/", "models/", "config/", "losses"))
    }
    assert not wrong, "\n".join(["", *sorted(wrong)])


def test_keys_exist_and_their_values_are_accepted() -> None:
    keys = {*field_paths(RunConfig), *field_paths(SweepConfig)}
    sections = {key.partition(".")[0] for key in keys if "." in key}
    pattern = (
        rf"(?<![\w./-])((?:{'|'.join(sorted(sections))})(?:\.[a-z][a-z0-9_]*)+)(?:=([\w./-]+))?"
    )
    wrong = []
    for place, text in TEXTS:
        for key, value in re.findall(pattern, text):
            if key not in keys:
                wrong.append(f"{place}: {key}")
            elif value and key in field_paths(RunConfig):
                refusal = refused(f"{key}={value.rstrip('.')}")
                if refusal and f"`{key}`" in refusal:  # a rule over other fields is another matter
                    wrong.append(f"{place}: {key}={value}: {refusal}")
    assert not wrong, "\n".join(["", *sorted(wrong)])


def refused(override: str) -> str | None:
    try:
        resolve_config("smoke", None, [override])
    except ConfigError as error:
        return error.what
    return None


def typed() -> list[Text]:
    """Each command that stands between backticks."""
    return [
        Text(place, command)
        for place, text in TEXTS
        for command in re.findall(r"`([^`]+)`", text)
        if re.match(r"(mltfr|python|deepspeed|torchrun|pip|hf|git) ", command)
    ]


def test_commands_can_be_typed() -> None:
    wrong = []
    for place, command in typed():
        program, *words = shlex.split(command.replace("{…}", "X"))
        if program != "mltfr":
            continue
        if words[0] not in commands():
            wrong.append(f"{place}: {command}")
            continue
        # `mltfr prepare` alone names the command; with words behind it, it must parse as it stands.
        if len(words) > 1 and "--help" not in words:
            try:
                build_parser().parse_args(words)
            except SystemExit as exit:
                if exit.code:  # what only shows a list or a help text ends with 0
                    wrong.append(f"{place}: {command}")
    assert not wrong, "\n".join(["", *sorted(wrong)])


@pytest.mark.parametrize("section", COMMAND_SECTIONS, ids=lambda section: section.__name__)
def test_a_refused_option_is_named_as_it_was_typed(section: type[Options]) -> None:
    for field in section.model_fields:
        with pytest.raises(ConfigError) as caught:
            validate(section, {field: object()}, source="the command line")
        assert f"`--{field.replace('_', '-')}`" in caught.value.what
        assert f"`mltfr {section.listed_by} --help`" in caught.value.remedy
        assert "--" + field.replace("_", "-") in options_of(commands()[section.listed_by])
