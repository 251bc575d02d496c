"""The `mltfr` command: prepare, fetch, inspect, tables, train and others; and train.py's share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mltfr_dist.cli.commands import COMMANDS, kept_by
from mltfr_dist.cli.fields import add_section, section_from
from mltfr_dist.cli.help import Parser, add_train_options
from mltfr_dist.cli.parser import build_parser, parse_intermixed
from mltfr_dist.distributed.signals import ended_by_signals
from mltfr_dist.errors import MltfrError, fail, quiet_pipe
from mltfr_dist.startup import start_up

__all__ = [
    "Parser",
    "add_section",
    "add_train_options",
    "build_parser",
    "main",
    "parse_intermixed",
    "section_from",
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    with quiet_pipe() as pipe:
        options = parse_intermixed(build_parser(), arguments)
        with ended_by_signals(kept_by(options)):
            if options.command in ("train", "evaluate"):
                with start_up():
                    return _run_on_ranks(options)
            try:
                COMMANDS[options.command](options)
            except MltfrError as error:
                return fail(error)
    return pipe.exit_code


def _run_on_ranks(options: argparse.Namespace) -> int:
    """A command that a launcher may start several times: one rank speaks, for all."""
    from mltfr_dist.distributed.last_word import record_traceback
    from mltfr_dist.distributed.meeting import has_met, leave, say_why, stop_ranks

    code = 0
    try:
        COMMANDS[options.command](options)
    except MltfrError as error:
        code = say_why(error)
    except Exception as error:
        record_traceback(error)
        raise
    finally:
        stop_ranks()
    if has_met():
        leave(code)
    return code
