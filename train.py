"""Train MLTFR: `deepspeed train.py --preset demo`, `torchrun train.py ...` or
`python train.py ...`.
"""

from __future__ import annotations

import argparse

from mltfr_dist.distributed.signals import ended_by_signals
from mltfr_dist.errors import MltfrError
from mltfr_dist.invocation import command, is_first
from mltfr_dist.startup import start_up


def main(arguments: list[str] | None = None) -> int:
    """Train; returns the exit code."""
    with ended_by_signals("the run: what it has saved stays"):
        options = _options(arguments)
        with start_up():
            return _train(options)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    from mltfr_dist.cli import Parser, add_train_options, parse_intermixed

    parser = Parser(prog=command("train"), description=__doc__, add_help=False)
    add_train_options(parser)
    return parse_intermixed(parser, arguments)


def _train(options: argparse.Namespace) -> int:
    from mltfr_dist.distributed.last_word import record_traceback
    from mltfr_dist.distributed.meeting import say_why, stop_ranks  # imports torch: not for --help
    from mltfr_dist.resolve import resolve_config

    try:
        config = resolve_config(options.preset, options.config, options.overrides)
        if options.print_config:
            from mltfr_dist.training.run_folder import dump_config

            print(dump_config(config) if is_first() else "", end="")
            return 0
        from mltfr_dist.training.running.fit import fit

        fit(config, resume=options.resume == "auto")
    except MltfrError as error:
        return say_why(error)
    except Exception as error:
        record_traceback(error)
        raise
    finally:
        stop_ranks()
    return 0


if __name__ == "__main__":
    code = main()
    from mltfr_dist.distributed.meeting import leave

    leave(code)
