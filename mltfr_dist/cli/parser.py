"""The whole command line of `mltfr`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mltfr_dist import __version__
from mltfr_dist.baselines import BASELINES
from mltfr_dist.cli.commands import COMMANDS
from mltfr_dist.cli.completion import add_completion
from mltfr_dist.cli.fields import add_section
from mltfr_dist.cli.help import Parser, add_sweep_help, add_train_options
from mltfr_dist.cli.input_parsers import add_fetch, add_inspect, add_prepare, add_tables
from mltfr_dist.config.index import IndexConfig
from mltfr_dist.files import packaged_names
from mltfr_dist.invocation import command

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[Parser]


def _add_train(commands: Commands) -> None:
    train = commands.add_parser(
        "train",
        help="train in one process (several: `torchrun -m mltfr_dist.train`)",
        add_help=False,
    )
    add_train_options(train)


def _add_sweep(commands: Commands) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="search a space of configurations",
        description=COMMANDS["sweep"].__doc__,
        add_help=False,
    )
    add_sweep_help(sweep)
    sweep.add_argument(
        "space",
        help="YAML file, or one that comes with the program: "
        + ", ".join(packaged_names("tuning/spaces/*.yaml")),
    )
    sweep.add_argument(
        "--address",
        help="Ray cluster, host:port (default: one on this machine, for the sweep alone)",
    )
    sweep.add_argument(
        "--nodes", type=int, default=1, help="nodes of that cluster to wait for (default: 1)"
    )
    sweep.add_argument(
        "--dry-run", action="store_true", help="check everything, list the trials, run none"
    )
    sweep.add_argument(
        "--retry-failed",
        action="store_true",
        help="trials that failed go on, from their last checkpoint",
    )
    sweep.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="over the file's, such as num_trials=20"
    )


def _add_evaluate(commands: Commands) -> None:
    evaluate = commands.add_parser(
        "evaluate", help="repeat a run's numbers", description=COMMANDS["evaluate"].__doc__
    )
    evaluate.add_argument("run", help="run folder, such as runs/demo")
    evaluate.add_argument("--split", choices=("valid", "test"), default="test")
    evaluate.add_argument(
        "--save-ranks",
        action="store_true",
        help="also write ranks.parquet into the run's folder, for `mltfr compare`",
    )
    evaluate.add_argument(
        "--lists",
        action="store_true",
        help="also measure what is recommended: coverage, novelty, popularity and, where items "
        "have titles, diversity",
    )
    evaluate.add_argument(
        "--baseline",
        choices=tuple(BASELINES),
        metavar="NAME",
        help="the numbers of a baseline instead, fitted anew on the run's data: "
        + ", ".join(BASELINES),
    )


def _add_recommend(commands: Commands) -> None:
    recommend = commands.add_parser(
        "recommend", help="items for histories", description=COMMANDS["recommend"].__doc__
    )
    recommend.add_argument("run", help="run folder, such as runs/demo, or an exported model")
    recommend.add_argument(
        "--history", help="one history: item ids of the raw data, oldest first, comma-separated"
    )
    recommend.add_argument(
        "--histories",
        type=Path,
        help="many: a .parquet, .csv or .jsonl file whose column `history` lists item ids, with "
        "`user_id` beside it; interrupted, the same command goes on, and a launcher may start it "
        "several times",
    )
    recommend.add_argument(
        "--output", type=Path, help="with --histories: Parquet file of user_id, item_ids, scores"
    )
    recommend.add_argument("--k", type=int, default=10, help="items to list (default: 10)")
    recommend.add_argument(
        "--explain", action="store_true", help="also the kept tokens per table and the gate weights"
    )
    recommend.add_argument(
        "--keep-seen", action="store_true", help="let items of the history be recommended again"
    )
    recommend.add_argument(
        "--unknown",
        choices=("refuse", "drop"),
        default="refuse",
        help="with --histories: ids that the model does not know (default: refuse); dropped ones "
        "are counted",
    )
    recommend.add_argument(
        "--empty",
        choices=("refuse", "popular"),
        default="refuse",
        help="with --histories: histories without an item (default: refuse), or popular items",
    )


def _add_explain(commands: Commands) -> None:
    explain = commands.add_parser(
        "explain",
        help="a page on what a run reads, and what that changes",
        description=COMMANDS["explain"].__doc__,
    )
    explain.add_argument("run", help="run folder, such as runs/demo")
    explain.add_argument(
        "--control", type=Path, help="a run whose figures stand beside, as of random tables"
    )
    explain.add_argument("--users", type=int, default=5, help="sample users (default: 5)")
    explain.add_argument(
        "--output", type=Path, help="HTML file (default: explain.html in the run's folder)"
    )


def _add_export(commands: Commands) -> None:
    exported = commands.add_parser(
        "export", help="a model to use without DeepSpeed", description=COMMANDS["export"].__doc__
    )
    exported.add_argument("run", help="run folder, such as runs/demo")
    exported.add_argument("output", help="folder to write; it must not exist")
    exported.add_argument(
        "--format",
        choices=("safetensors", "onnx"),
        default="safetensors",
        help="safetensors: for `mltfr recommend` and Python, scores equal to the bit; onnx: for "
        "other programs, equal to 1e-5 (default: safetensors)",
    )


def _add_index(commands: Commands) -> None:
    index = commands.add_parser(
        "index",
        help="item vectors for searches of nearest neighbours",
        description=COMMANDS["index"].__doc__,
    )
    index.add_argument("run", help="run folder, such as runs/demo, or an exported model")
    index.add_argument(
        "--output", type=Path, required=True, help="folder to write; it must not exist"
    )
    index.add_argument(
        "--histories",
        type=Path,
        help="file of histories that recall is measured on, as `mltfr recommend` takes it "
        "(default: the validation histories of the run's data)",
    )
    add_section(index, IndexConfig)


def _add_report(commands: Commands) -> None:
    report = commands.add_parser(
        "report", help="show a run's report, or a matrix's", description=COMMANDS["report"].__doc__
    )
    report.add_argument(
        "runs",
        metavar="run",
        nargs="+",
        help="run folder, such as runs/demo, or Parquet files that benchmarks/quality.py wrote, "
        "taken together",
    )
    _add_margin(report)


def _add_margin(parser: Parser) -> None:
    parser.add_argument(
        "--margin", type=float, help="also test equivalence: differences within +-MARGIN are none"
    )
    parser.add_argument(
        "--difference",
        type=float,
        help="difference that the number of seeds is told for (default: the observed one)",
    )


def _add_compare(commands: Commands) -> None:
    compare = commands.add_parser(
        "compare",
        help="runs against each other, user by user",
        description=COMMANDS["compare"].__doc__,
    )
    compare.add_argument(
        "runs",
        metavar="run",
        nargs="+",
        help="run folders, matrices of benchmarks/quality.py, or Parquet files with columns user, "
        "target and "
        "rank; the first model is the reference, and runs that differ in their seed alone are one "
        "model",
    )
    compare.add_argument("--split", choices=("valid", "test"), default="test")
    compare.add_argument(
        "--metric", default="NDCG@10", help="metric that is tested, at any K (default: NDCG@10)"
    )
    _add_margin(compare)
    compare.add_argument(
        "--resamples", type=int, default=10_000, help="of bootstrap and test (default: 10000)"
    )
    compare.add_argument("--seed", type=int, default=0, help="of the resampling (default: 0)")
    compare.add_argument(
        "--output", type=Path, help="folder for compare.md, compare.json and compare.png"
    )


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog=command(),
        description="Multi-LLM token filtering and routing for sequential recommendation.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    add_completion(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        add_prepare,
        add_fetch,
        add_inspect,
        add_tables,
        _add_train,
        _add_sweep,
        _add_evaluate,
        _add_recommend,
        _add_explain,
        _add_export,
        _add_index,
        _add_report,
        _add_compare,
    ):
        add(commands)
    for name, added in commands.choices.items():
        added.prog = command(name)
    return parser


def parse_intermixed(parser: Parser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line in which options may stand between the values of the list that ends it.

    argparse takes only the first run of such values, and its own remedy knows no subcommands.
    """
    options, rest = parser.parse_known_args(arguments)
    lists = [name for name in ("overrides", "sources", "runs") if hasattr(options, name)]
    if rest and (not lists or any(value[:1] == "-" != value for value in rest)):
        _parser_of(parser, options).refuse(rest)
    if rest and getattr(options, "command", None) == "prepare":
        # argparse took the last word before an option for the output, which stands at the very end.
        rest = [options.output, *rest]
        options.output = rest.pop()
    for name in lists:
        setattr(options, name, [*getattr(options, name), *rest])
    return options


def _parser_of(parser: Parser, options: argparse.Namespace) -> Parser:
    """The parser of the command that was given, or ``parser`` where it has no commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            chosen = action.choices[options.command]
            assert isinstance(chosen, Parser)
            return chosen
    return parser
