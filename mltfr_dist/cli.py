"""The `mltfr` command: prepare, inspect, tables, train, sweep, evaluate, recommend, export, report; and train.py's share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mltfr_dist import __version__
from mltfr_dist.config import PrepareConfig, PrepareResources, RunConfig, TableConfig
from mltfr_dist.errors import ConfigError, MltfrError, fail
from mltfr_dist.presets import PRESETS
from mltfr_dist.resolve import resolve_config
from mltfr_dist.schema import Section, validate

# --- configuration from the command line -------------------------------------------------------------------------


def config_epilog() -> str:
    """Every field of a run's configuration, with its default."""
    return "configuration (YAML or KEY=VALUE):\n" + "\n".join(_describe(RunConfig, ""))


def sweep_epilog() -> str:
    """Every field of a sweep's file, with its default, and of what `search` gives each key."""
    from mltfr_dist.tuning.space import Domain, SweepConfig

    domain = "\n\n  search.KEY: the values of one field, exactly one of\n" + "\n".join(
        _describe(Domain, "search.KEY.")
    )
    return "the file, and KEY=VALUE over it:\n" + "\n".join(_describe(SweepConfig, "")) + domain


def _describe(model: type[Section], prefix: str) -> list[str]:
    lines = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            lines.append(f"\n  {prefix}{name}: {field.description}")
            lines += _describe(field.annotation, f"{prefix}{name}.")
        else:
            lines.append(
                f"    {prefix}{name} ({type_text(field)}; default: {default_text(field)})\n        {field.description}"
            )
    return lines


def type_text(field: FieldInfo) -> str:
    """A field's type as a user writes it, with its bounds."""
    choices = _choices(field.annotation)
    if choices:
        return " | ".join(choices)
    bounds = [
        f"{symbol}{getattr(m, name)}"
        for m in _metadata(field)
        for name, symbol in _BOUNDS
        if hasattr(m, name)
    ]
    options = [_type_name(a) for a in _options(field.annotation)]
    return " or ".join(options) + (f", {', '.join(bounds)}" if bounds else "")


_BOUNDS = (("gt", "> "), ("ge", ">= "), ("lt", "< "), ("le", "<= "))


def _metadata(field: FieldInfo) -> list[Any]:
    found = list(field.metadata)
    for option in get_args(field.annotation):
        found += [
            m
            for info in getattr(option, "__metadata__", ())
            for m in getattr(info, "metadata", [info])
        ]
    return found


def _options(annotation: Any) -> list[Any]:
    return (
        list(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else [annotation]
    )


def _type_name(annotation: Any) -> str:
    if annotation is NoneType:
        return "null"
    if get_origin(annotation) is tuple:
        return "list of " + _type_name(get_args(annotation)[0])
    if hasattr(annotation, "__metadata__"):
        return _type_name(annotation.__origin__)
    choices = _choices(annotation)
    return (
        " | ".join(choices) if choices else getattr(annotation, "__name__", str(annotation)).lower()
    )


def _choices(annotation: Any) -> list[str]:
    return [str(a) for a in get_args(annotation) if isinstance(a, str)]


def default_text(field: FieldInfo) -> str:
    """A field's default as a user writes it."""
    if field.default is PydanticUndefined:
        return "required"
    value = field.default
    if isinstance(value, Path):
        value = str(value)
    return json.dumps(value)


class _FormatAction(argparse.Action):
    """`--format NAME`; `--format help` lists the names."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Keep the name, or print the list and exit."""
        if values == "help":
            from mltfr_dist.data.layouts import format_help

            print(format_help(), end="")
            parser.exit()
        setattr(namespace, self.dest, values)


def add_section(
    parser: argparse.ArgumentParser,
    model: type[Section],
    actions: dict[str, type[argparse.Action]] | None = None,
) -> None:
    """One option for each field of a flat section; ``actions`` are those of single fields."""
    for name, field in model.model_fields.items():
        options: dict[str, Any] = {
            "help": f"{field.description} ({type_text(field)}; default: {default_text(field)})"
        }
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(field.annotation) is tuple:
            options["action"] = "append"
        elif name in (actions or {}):
            options["action"] = (actions or {})[name]
        parser.add_argument(
            "--" + name.replace("_", "-"),
            default=None,
            **{k: _escape(v) for k, v in options.items()},
        )


def _escape(value: Any) -> Any:
    return value.replace("%", "%%") if isinstance(value, str) else value


def section_from(model: type[Section], options: argparse.Namespace) -> Any:
    """The section that the given options describe."""
    given = {
        name: getattr(options, name)
        for name in model.model_fields
        if getattr(options, name) is not None
    }
    return validate(model, given, source="the command line")


# --- commands ----------------------------------------------------------------------------------------------------


def command_prepare(options: argparse.Namespace) -> None:
    """Interactions to shards."""
    from mltfr_dist.data.prepare import prepare

    config, resources = (
        section_from(PrepareConfig, options),
        section_from(PrepareResources, options),
    )
    prepare(
        options.source, options.output, config, resources=resources, packages_dir=options.packages
    )


def command_inspect(options: argparse.Namespace) -> None:
    """Counts, lengths, popularity, times, duplicates and cold items of a prepared folder."""
    from mltfr_dist.data.inspect import inspect

    print(inspect(Path(options.data), options.output))


def command_tables(options: argparse.Namespace) -> None:
    """Language models to token tables."""
    from mltfr_dist.tables.build import DEMO_TABLES, build_demo_table, build_table

    config: TableConfig = section_from(TableConfig, options)
    if options.name and len(options.sources) > 1:
        raise ConfigError(
            "--name is given for several sources.", remedy="Extract them one at a time."
        )
    for source in options.sources:
        if source in DEMO_TABLES and not Path(source).exists():
            build_demo_table(source, options.output, config, packages=options.packages)
        else:
            build_table(source, options.output, config, name=options.name)


def command_train(options: argparse.Namespace) -> None:
    """The same as `python train.py`."""
    from mltfr_dist.training.fit import fit

    fit(
        resolve_config(options.preset, options.config, options.overrides),
        resume=options.resume == "auto",
    )


def command_sweep(options: argparse.Namespace) -> None:
    """Search a space of configurations by trials that Ray Tune runs; interrupted, the same command goes on."""
    from mltfr_dist.tuning.sweep import load_sweep, run_sweep

    report = run_sweep(
        load_sweep(Path(options.space), options.overrides),
        address=options.address,
        nodes=options.nodes,
    )
    print(report.read_text(), end="")


def command_evaluate(options: argparse.Namespace) -> None:
    """A run's numbers again, from its best checkpoint."""
    from mltfr_dist.training.inference import evaluate_run

    print(json.dumps(evaluate_run(Path(options.run), options.split), indent=2))


def command_recommend(options: argparse.Namespace) -> None:
    """The best items after a history."""
    from mltfr_dist.training.inference import load_run, recommendation_text

    history = [part.strip() for part in options.history.split(",") if part.strip()]
    loaded = load_run(Path(options.run))
    print(
        recommendation_text(
            loaded, history, k=options.k, explain=options.explain, keep_seen=options.keep_seen
        )
    )


def command_export(options: argparse.Namespace) -> None:
    """The chosen model of a finished run, in safetensors, to be used without DeepSpeed, the data or the tables' folders."""
    from mltfr_dist.training.export import export

    info = export(Path(options.run), Path(options.output))
    print(
        f"{options.output}: {info.backbone.name}, {info.num_items} items, {len(info.tables)} token tables"
    )


def command_report(options: argparse.Namespace) -> None:
    """report.md of a finished run; for matrices of runs (.parquet) means, intervals, paired differences, slices of users."""
    from mltfr_dist.training.matrix import summary
    from mltfr_dist.training.run_folder import REPORT, load_config

    paths = [Path(run) for run in options.run]
    if all(path.suffix == ".parquet" for path in paths):
        print(summary(paths))
        return
    if len(paths) > 1:
        raise ConfigError(
            f"{len(paths)} names were given, not all of them matrices.",
            rule="One run folder, or any number of .parquet files.",
            remedy="Name one run at a time.",
        )
    (folder,) = paths
    load_config(folder)
    if not (folder / REPORT).exists():
        raise ConfigError(
            f"The run {folder} is not finished.",
            remedy=f"Go on: `python train.py --config {folder}/config.yaml`.",
        )
    print((folder / REPORT).read_text(), end="")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="mltfr",
        description="Multi-LLM token filtering and routing for sequential recommendation.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    prepare = commands.add_parser(
        "prepare", help="raw interactions to shards", description=command_prepare.__doc__
    )
    prepare.add_argument(
        "source",
        help="files (csv, tsv, parquet, jsonl, sequence text; .gz too): path, glob or URL; or the named set ml-100k",
    )
    prepare.add_argument("output", help="folder or URL to write; it must not hold other data")
    prepare.add_argument(
        "--packages", type=Path, help="folder of unpacked packages that hold the named set"
    )
    add_section(prepare, PrepareConfig, {"format": _FormatAction})
    add_section(prepare, PrepareResources)

    inspect = commands.add_parser(
        "inspect", help="what a prepared folder holds", description=command_inspect.__doc__
    )
    inspect.add_argument("data", help="folder written by `mltfr prepare`")
    inspect.add_argument("--output", type=Path, help="folder for PNG plots and a TensorBoard page")

    tables = commands.add_parser(
        "tables", help="language models to token tables", description=command_tables.__doc__
    )
    tables.add_argument(
        "sources",
        nargs="+",
        help="safetensors or GGUF file, checkpoint folder, hub id, or a demo table: llama2, smollm2, minilm",
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
    add_section(tables, TableConfig)

    train = commands.add_parser(
        "train", help="train in one process (several: `deepspeed train.py`)"
    )
    train.add_argument("--preset", help=f"one of {', '.join(PRESETS)}")
    train.add_argument("--config", help="YAML file; its keys go over the preset's")
    train.add_argument("--resume", choices=("auto", "never"), default="auto")
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE")

    sweep = commands.add_parser(
        "sweep",
        help="search a space of configurations",
        description=command_sweep.__doc__,
        epilog=sweep_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sweep.add_argument("space", help="YAML file, such as tuning/spaces/demo.yaml")
    sweep.add_argument(
        "--address",
        help="Ray cluster, host:port (default: one on this machine, for the sweep alone)",
    )
    sweep.add_argument(
        "--nodes", type=int, default=1, help="nodes of that cluster to wait for (default: 1)"
    )
    sweep.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="over the file's, such as num_trials=20"
    )

    evaluate = commands.add_parser(
        "evaluate", help="repeat a run's numbers", description=command_evaluate.__doc__
    )
    evaluate.add_argument("run", help="run folder, such as runs/demo")
    evaluate.add_argument("--split", choices=("valid", "test"), default="test")

    recommend = commands.add_parser(
        "recommend", help="items for a history", description=command_recommend.__doc__
    )
    recommend.add_argument("run", help="run folder, such as runs/demo")
    recommend.add_argument(
        "--history", required=True, help="item ids of the raw data, oldest first, comma-separated"
    )
    recommend.add_argument("--k", type=int, default=10, help="items to list (default: 10)")
    recommend.add_argument(
        "--explain", action="store_true", help="also the kept tokens per table and the gate weights"
    )
    recommend.add_argument(
        "--keep-seen", action="store_true", help="let items of the history be recommended again"
    )

    exported = commands.add_parser(
        "export", help="a model to use without DeepSpeed", description=command_export.__doc__
    )
    exported.add_argument("run", help="run folder, such as runs/demo")
    exported.add_argument("output", help="folder to write; it must not exist")

    report = commands.add_parser(
        "report", help="show a run's report, or a matrix's", description=command_report.__doc__
    )
    report.add_argument(
        "run",
        nargs="+",
        help="run folder, such as runs/demo, or Parquet files that benchmarks/quality.py wrote, taken together",
    )
    return parser


COMMANDS = {
    "prepare": command_prepare,
    "inspect": command_inspect,
    "tables": command_tables,
    "train": command_train,
    "sweep": command_sweep,
    "evaluate": command_evaluate,
    "recommend": command_recommend,
    "export": command_export,
    "report": command_report,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    options = build_parser().parse_args(arguments)
    try:
        COMMANDS[options.command](options)
    except MltfrError as error:
        return fail(error)
    finally:
        if options.command in ("train", "evaluate"):
            from mltfr_dist.distributed.ranks import stop_ranks

            stop_ranks()
    return 0
