"""Options of the commands that make and show what a run reads: data and token tables."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mltfr_dist.cli.commands import COMMANDS
from mltfr_dist.cli.fields import FormatAction, add_section
from mltfr_dist.cli.help import Parser
from mltfr_dist.config import PrepareConfig, PrepareResources, TableConfig
from mltfr_dist.data.sources.public_sets import SETS

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[Parser]


def add_prepare(commands: Commands) -> None:
    """Options of `mltfr prepare`."""
    prepare = commands.add_parser(
        "prepare", help="raw interactions to shards", description=COMMANDS["prepare"].__doc__
    )
    prepare.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="files (also .gz, .bz2, .xz, .zst, .zip), folders, patterns, URLs, or - for standard "
        "input, taken together in this order; or the name of a set that `mltfr fetch` lists",
    )
    prepare.add_argument(
        "output", metavar="OUTPUT", help="folder or URL to write; it must not hold other data"
    )
    prepare.add_argument(
        "--download", action="store_true", help="fetch the public set first, if it is not here"
    )
    prepare.add_argument(
        "--sets",
        type=Path,
        default=SETS,
        help=f"folder of fetched public sets (default: {SETS})",
    )
    prepare.add_argument(
        "--packages", type=Path, help="folder of unpacked packages that hold the named set"
    )
    add_section(prepare, PrepareConfig, {"format": FormatAction})
    add_section(prepare, PrepareResources)


def add_fetch(commands: Commands) -> None:
    """Options of `mltfr fetch`."""
    fetch = commands.add_parser(
        "fetch", help="public sets by name", description=COMMANDS["fetch"].__doc__
    )
    fetch.add_argument("names", nargs="*", metavar="NAME", help="sets; none: list them")
    fetch.add_argument(
        "--output", type=Path, default=SETS, help=f"folder for them (default: {SETS})"
    )


def add_inspect(commands: Commands) -> None:
    """Options of `mltfr inspect`."""
    inspect = commands.add_parser(
        "inspect",
        help="what a prepared folder or a token table holds",
        description=COMMANDS["inspect"].__doc__,
    )
    inspect.add_argument("folder", help="folder written by `mltfr prepare` or `mltfr tables`")
    inspect.add_argument(
        "--output", type=Path, help="prepared data: folder for PNG plots and a TensorBoard page"
    )
    inspect.add_argument(
        "--neighbours",
        metavar="WORD",
        help="token table: the tokens nearest to this one, by cosine",
    )


def add_tables(commands: Commands) -> None:
    """Options of `mltfr tables`."""
    tables = commands.add_parser(
        "tables", help="language models to token tables", description=COMMANDS["tables"].__doc__
    )
    tables.add_argument(
        "sources",
        nargs="+",
        help="safetensors or GGUF file, checkpoint folder, hub id, or a demo table: llama2, "
        "smollm2, minilm",
    )
    tables.add_argument(
        "--output",
        type=Path,
        default=Path("data/tables"),
        help="folder of tables (default: data/tables)",
    )
    tables.add_argument("--name", help="name of the table (default: from the source)")
    tables.add_argument(
        "--packages", type=Path, help="folder of unpacked packages that hold the demo tables"
    )
    tables.add_argument(
        "--inspect",
        action="store_true",
        help="the sources are stored tables: show what their geometry has to offer; nothing is "
        "built",
    )
    tables.add_argument(
        "--words",
        metavar="WORD",
        nargs="+",
        help="with --inspect: words whose nearest tokens are shown",
    )
    tables.add_argument(
        "--pictures", type=Path, help="with --inspect: folder for a PNG and a TensorBoard page"
    )
    add_section(tables, TableConfig)
