"""`mltfr --completion SHELL`: a script that completes commands, options, their values, and keys of
the configuration.

It is written from the command line's own definition, so it holds what `--help` shows; the shell
then asks nobody.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mltfr_dist.config import RunConfig
from mltfr_dist.files import packaged_names
from mltfr_dist.presets import PRESETS
from mltfr_dist.schema import field_at, field_paths

SHELLS = ("bash", "zsh", "fish")

# What _mltfr completes: the word $cur, after $prev, of the command $cmd, which is the first word
# that is no option.
# A word that begins like a key of the configuration gets `key=` without a blank behind it.
_BASH = """\
_mltfr() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[$((COMP_CWORD - 1))]}} cmd= word words= keys=
    for word in "${{COMP_WORDS[@]:1:$((COMP_CWORD - 1))}}"; do
        if [[ $word != -* ]]; then cmd=$word; break; fi
    done
    case "$cmd $prev" in
{values}
    esac
    if [[ -z $words ]]; then
        case $cmd in
{commands}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
    if [[ -n $keys && $cur != -* && $cur != */* ]]; then
        local found=($(compgen -W "$keys" -- "$cur"))
        if (( ${{#found[@]}} )); then COMPREPLY+=("${{found[@]/%/=}}"); compopt -o nospace 2>/dev/null; fi
    fi
}}
complete -o default -o bashdefault -F _mltfr mltfr
"""  # noqa: E501


class Command(NamedTuple):
    """What can be typed after a command."""

    name: str
    text: str
    options: dict[str, tuple[str, ...]]
    """Each option and its values; none where it takes anything, or nothing."""
    words: tuple[str, ...]
    """What can stand for itself, such as the ready-made spaces."""
    keys: tuple[str, ...]
    """What can stand before an equals sign."""


class CompletionAction(argparse.Action):
    """Prints the script, and stops."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Called by argparse."""
        print(script(str(values), parser), end="")
        parser.exit()


def add_completion(parser: argparse.ArgumentParser) -> None:
    """The option."""
    parser.add_argument(
        "--completion",
        choices=SHELLS,
        action=CompletionAction,
        help='print what makes a shell complete this command: `eval "$(mltfr --completion bash)"`',
    )


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script of a shell."""
    commands = list(_commands(parser))
    if shell == "fish":
        return _fish(commands)
    first = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return first + _bash(commands)


def _commands(parser: argparse.ArgumentParser) -> Iterator[Command]:
    """The program itself, under the name "", and each of its commands."""
    (choices,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    texts = {action.dest: action.help or "" for action in choices._choices_actions}
    yield Command("", "", _options(parser), tuple(choices.choices), ())
    for name, one in choices.choices.items():
        words = packaged_names("tuning/spaces/*.yaml") if name == "sweep" else []
        keys = _run_keys() if name == "train" else ()
        yield Command(name, texts[name], _options(one), tuple(words), keys)


def _options(parser: argparse.ArgumentParser) -> dict[str, tuple[str, ...]]:
    options = {}
    for action in parser._actions:
        if action.help != argparse.SUPPRESS:
            values = tuple(map(str, action.choices or ())) if action.option_strings else ()
            for option in action.option_strings:
                options[option] = tuple(PRESETS) if option == "--preset" else values
    return options


def _run_keys() -> tuple[str, ...]:
    """Dotted keys that hold a value."""
    keys = field_paths(RunConfig)
    sections = {key.rpartition(".")[0] for key in keys}
    return tuple(key for key in keys if key not in sections and field_at(RunConfig, key))


def _bash(commands: Sequence[Command]) -> str:
    values = [
        f'        "{command.name} {option}") words={shlex.quote(" ".join(allowed))};;'
        for command in commands
        for option, allowed in command.options.items()
        if allowed
    ]
    lines = [
        f"            {shlex.quote(command.name)}) "
        f"words={shlex.quote(' '.join((*command.words, *command.options)))} "
        f"keys={shlex.quote(' '.join(command.keys))};;"
        for command in commands
    ]
    return _BASH.format(values="\n".join(values), commands="\n".join(lines))


def _fish(commands: Sequence[Command]) -> str:
    lines = []
    for command in commands:
        on = "__fish_use_subcommand"
        if command.name:
            lines.append(f"complete -c mltfr -n {on} -a {command.name} -d {_quoted(command.text)}")
            on = _quoted(f"__fish_seen_subcommand_from {command.name}")
        words = (*command.words, *(f"{key}=" for key in command.keys))
        if words and command.name:
            lines.append(f"complete -c mltfr -n {on} -a {_quoted(' '.join(words))}")
        for option, allowed in command.options.items():
            flag = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
            more = f" -x -a {_quoted(' '.join(allowed))}" if allowed else ""
            lines.append(f"complete -c mltfr -n {on} {flag}{more}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """In single quotes, as fish reads them."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
