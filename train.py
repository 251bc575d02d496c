"""Train MLTFR: `deepspeed train.py --preset demo`, `torchrun train.py ...` or
`python train.py ...`.
"""

from __future__ import annotations

import argparse

from mltfr_dist.cli import Parser, add_config_help, parse_intermixed
from mltfr_dist.errors import MltfrError
from mltfr_dist.invocation import command, is_first
from mltfr_dist.presets import PRESETS
from mltfr_dist.resolve import resolve_config
from mltfr_dist.startup import start_up


def main(arguments: list[str] | None = None) -> int:
    """Train; returns the exit code."""
    parser = Parser(prog=command("train"), description=__doc__, add_help=False)
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
    parser.add_argument(
        "--local_rank", "--local-rank", help=argparse.SUPPRESS
    )  # launchers pass it; the environment has it too
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="dotted keys, such as optimizer.learning_rate=0.0005",
    )
    options = parse_intermixed(parser, arguments)
    with start_up():
        return _train(options)


def _train(options: argparse.Namespace) -> int:
    from mltfr_dist.distributed.last_word import record_traceback
    from mltfr_dist.distributed.meeting import say_why, stop_ranks  # imports torch: not for --help

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
