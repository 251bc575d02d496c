"""Help that fits the screen: parsers, and the fields of a configuration by section."""

from __future__ import annotations

import argparse
import difflib
import shutil
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from mltfr_dist.cli.fields import default_text, type_text
from mltfr_dist.config import RunConfig
from mltfr_dist.errors import ConfigError
from mltfr_dist.invocation import is_first, is_rank
from mltfr_dist.presets import PRESETS
from mltfr_dist.progress import say_error
from mltfr_dist.schema import Section, field_at, field_paths, nearest_key, section_at

WIDEST = 100
"""Columns of help where it does not go to a terminal; longer lines are hard to read on any."""

EVERYTHING = "all"
"""What `--help` takes for every field."""


def _fill(text: str, width: int, initial_indent: str = "", subsequent_indent: str = "") -> str:
    """``text`` in lines of at most ``width``, broken between words and never at a hyphen."""
    wrapper = textwrap.TextWrapper(width, initial_indent, subsequent_indent)
    wrapper.break_on_hyphens = False
    return wrapper.fill(text)


def columns() -> int:
    """Columns that help may take: those of the terminal, or of COLUMNS, up to :data:`WIDEST`."""
    return min(WIDEST, shutil.get_terminal_size(fallback=(WIDEST, 24)).columns)


class Formatter(argparse.HelpFormatter):
    """argparse's, within :func:`columns`."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"width": columns() - 2, **options})


class Parser(argparse.ArgumentParser):
    """A parser whose help fits the screen, and whose errors name the command that was typed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": Formatter, **options})
        self.appendix: Callable[[], str] = str
        """Makes what stands below the options in the help."""
        self.topic: Callable[[str], str] = str
        """What `--help TOPIC` says, where the parser takes topics."""

    def format_help(self) -> str:
        """The options, and what the appendix says."""
        return "\n".join(filter(None, (super().format_help(), self.appendix())))

    def print_help(self, file: Any = None) -> None:
        """Print the help, of several ranks on the first alone."""
        if is_first():
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        """End with exit code 2; of several ranks one says why."""
        remedy = f"`{self.prog} --help` lists what can be given."
        if not is_rank():
            say_error(f"{self.format_usage()}{self.prog}: error: {message}\n{remedy}")
            self.exit(2)
        from mltfr_dist.distributed.meeting import say_why

        self.exit(say_why(ConfigError(f"{self.prog}: {message}.", remedy=remedy)))

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """End because of ``words`` that no option takes; name the nearest option."""
        options = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(words[0].partition("=")[0], options, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        self.error(f"unrecognized arguments: {' '.join(words)}{hint}")


class _TopicHelp(argparse.Action):
    """`--help`, `--help SECTION`, `--help KEY`, `--help all`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Print and exit."""
        assert isinstance(parser, Parser)
        if not values:
            parser.print_help()
        else:
            try:
                text = parser.topic(str(values).partition("=")[0])
            except ConfigError as error:
                parser.error(str(error).rstrip("."))
            if is_first():
                print(text)
        parser.exit()


def add_config_help(parser: Parser) -> None:
    """Give a parser, made with ``add_help=False``, help on a run's configuration by section."""
    _add_topics(parser, "mltfr.filter")
    parser.topic = lambda topic: topic_text(RunConfig, topic)
    parser.appendix = lambda: _overview(parser.prog)


def add_train_options(parser: Parser) -> None:
    """Give a parser, made with ``add_help=False``, what starts a run."""
    add_config_help(parser)
    parser.add_argument(
        "--preset", help=f"start from a complete configuration: {', '.join(PRESETS)}"
    )
    parser.add_argument("--config", help="YAML file; its keys go over the preset's")
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="go on from the run folder (default: auto)",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the complete configuration and stop"
    )
    # Launchers pass it; the environment has it too.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="dotted keys, such as optimizer.learning_rate=0.0005",
    )


def add_sweep_help(parser: Parser) -> None:
    """The same for a sweep's file."""
    _add_topics(parser, "search")
    parser.topic, parser.appendix = sweep_topic, lambda: _sweep_overview(parser.prog)


def _add_topics(parser: Parser, example: str) -> None:
    parser.add_argument(
        "-h",
        "--help",
        nargs="?",
        metavar="SECTION",
        action=_TopicHelp,
        default=argparse.SUPPRESS,
        help=f"show this; of a section or key such as {example} the fields; of `all` every field",
    )


def _overview(prog: str) -> str:
    """Presets and sections, a line each, and how to see more."""
    presets = {name: _sentence(make.__doc__ or "") for name, make in PRESETS.items()}
    sections = {
        path: _sentence(field.description or "")
        for path in field_paths(RunConfig)
        if (field := field_at(RunConfig, path)) and (section_at(RunConfig, path) or "." not in path)
    }
    more = (
        f"`{prog} --help mltfr.filter` lists the fields of that section with defaults, ranges and "
        f"units, `--help {EVERYTHING}` those of all."
    )
    return (
        f"presets:\n{_table(presets)}\n\nconfiguration, in YAML or as KEY=VALUE:\n"
        f"{_table(sections)}\n\n{_fill(more, columns() - 2)}\n"
    )


def sweep_topic(topic: str) -> str:
    """Fields of a sweep's file: of a section, one, or all; `search` has a section for each key."""
    from mltfr_dist.tuning.domain import Domain
    from mltfr_dist.tuning.space import SweepConfig

    text = topic_text(SweepConfig, topic)
    if topic in ("search", EVERYTHING):
        text += (
            "\n\nsearch.KEY: the values of one field, exactly one of\n"
            f"{fields_text(Domain, 'search.KEY.')}"
        )
    return text


def _sweep_overview(prog: str) -> str:
    from mltfr_dist.tuning.space import SweepConfig

    fields = {
        name: _sentence(field.description or "") for name, field in SweepConfig.model_fields.items()
    }
    more = (
        f"`{prog} --help search` says what a field's values can be, `--help asha` lists the fields "
        f"of that section, `--help {EVERYTHING}` those of all, with defaults and ranges."
    )
    return f"the file, and KEY=VALUE over it:\n{_table(fields)}\n\n{_fill(more, columns() - 2)}\n"


def _sentence(text: str) -> str:
    """The first sentence, on one line."""
    return " ".join(text.split()).partition(". ")[0].rstrip(".")


def _table(rows: dict[str, str]) -> str:
    widest = max(map(len, rows)) + 2
    return "\n".join(
        _fill(
            text,
            columns() - 2,
            initial_indent=f"  {name:<{widest}}",
            subsequent_indent=" " * (widest + 2),
        )
        for name, text in rows.items()
    )


def topic_text(model: type[Section], topic: str) -> str:
    """The fields of a section, one field, or with :data:`EVERYTHING` all fields of ``model``.

    Raises:
        ConfigError: There is no such section or field; the nearest is named.
    """
    if topic == EVERYTHING:
        return fields_text(model)
    field = field_at(model, topic)
    if field is None:
        near = nearest_key(topic, field_paths(model))
        raise ConfigError(
            f"there is no section or field `{topic}`",
            remedy=f"(the nearest is `{near}`)" if near else "",
        )
    section = section_at(model, topic)
    if section is None:
        return _field_text(topic, model)
    return f"{topic}: {field.description}\n{fields_text(section, f'{topic}.')}"


def fields_text(model: type[Section], prefix: str = "") -> str:
    """Every field of a section and of those inside it: type, range, default, what it does."""
    lines = []
    for name, field in model.model_fields.items():
        inner = section_at(model, name)
        if inner is None:
            lines.append(_field_text(name, model, prefix))
        else:
            heading = _fill(f"{prefix}{name}: {field.description}", columns() - 2)
            lines.append(f"\n{heading}\n{fields_text(inner, f'{prefix}{name}.')}")
    return "\n".join(lines)


def _field_text(path: str, model: type[Section], prefix: str = "") -> str:
    field = field_at(model, path)
    assert field is not None
    head = f"{prefix}{path}  ({type_text(field)}; default: {default_text(field)})"
    return f"{_wrapped(head, 2, 8)}\n{_wrapped(field.description or '', 6, 6)}"


def _wrapped(text: str, first: int, further: int) -> str:
    return _fill(text, columns() - 2, initial_indent=" " * first, subsequent_indent=" " * further)
