"""The `mltfr` command: prepare, fetch, inspect, tables, train and others; and train.py's share."""

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
from mltfr_dist.config import (
    PrepareConfig,
    PrepareResources,
    RunConfig,
    TableConfig,
    TrainingConfig,
)
from mltfr_dist.errors import ConfigError, DataError, MltfrError, fail, quiet_pipe
from mltfr_dist.presets import PRESETS
from mltfr_dist.resolve import resolve_config
from mltfr_dist.schema import Section, validate

SETS = Path("data/sets")

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
    if options.output == "-":
        raise ConfigError(
            "The output is a folder, and cannot be standard output.", remedy="Name a folder."
        )
    sources, config = _known_set(options, config)
    prepare(sources, options.output, config, resources=resources, packages_dir=options.packages)


def _known_set(
    options: argparse.Namespace, config: PrepareConfig
) -> tuple[Sequence[str], PrepareConfig]:
    """What to prepare: a public set's files and format in place of its name."""
    from mltfr_dist.data.fetch import use_set
    from mltfr_dist.data.public_sets import PUBLIC_SETS
    from mltfr_dist.data.sources import NAMED_SETS

    name = options.sources[0]
    is_set = len(options.sources) == 1 and name in PUBLIC_SETS
    if is_set and Path(name).exists():
        raise ConfigError(
            f"`{name}` is a public set, and a path here.",
            remedy=f"Give `./{name}` for the path, or work in another folder for the set.",
        )
    if options.download and not is_set:
        raise ConfigError(
            f"--download is given for {', '.join(options.sources)}, which is no public set.",
            remedy=f"The public sets are: {', '.join(PUBLIC_SETS)}.",
        )
    if not is_set or (name in NAMED_SETS and not options.download):
        return options.sources, config
    path, config = use_set(name, options.sets, config, download=options.download)
    return [path], config


def command_fetch(options: argparse.Namespace) -> None:
    """Public sets by name, from where their owners offer them; what was cut off goes on."""
    from mltfr_dist.data.fetch import fetch_set, sets_text

    if not options.names:
        print(sets_text())
    for name in options.names:
        fetch_set(name, options.output)


def command_inspect(options: argparse.Namespace) -> None:
    """What a folder holds.

    Of prepared data counts, lengths, popularity, times, duplicates and cold items; of a token
    table sizes, provenance, norms, tokens and the neighbours of a word.
    """
    folder = Path(options.folder)
    if (folder / "table.json").exists():
        from mltfr_dist.tables.inspect import inspect_table

        _refuse(options.output, "--output", "plots prepared data", f"{folder} is a token table")
        print(inspect_table(folder, options.neighbours))
    elif (folder / "manifest.json").exists():
        from mltfr_dist.data.inspect import inspect

        words = "looks up a word in a token table"
        _refuse(options.neighbours, "--neighbours", words, f"{folder} is prepared data")
        print(inspect(folder, options.output))
    else:
        raise _neither(folder)


def _refuse(value: object, option: str, does: str, but: str) -> None:
    if value is not None:
        raise ConfigError(f"{option} {does}, but {but}.", remedy=f"Leave {option} out.")


def _neither(folder: Path) -> DataError:
    """Why there is nothing to show, and what of it lies inside or nearby."""
    from mltfr_dist.tables.info import near_tables

    inside = sorted(
        str(file.parent)
        for name in ("table.json", "manifest.json")
        for file in folder.glob(f"*/{name}")
    )
    if inside:
        remedy = f"Name one of those inside it: {', '.join(inside)}."
    else:
        remedy = near_tables(folder) or "Make one with `mltfr prepare` or `mltfr tables`."
    state = "holds neither" if folder.exists() else "does not exist, so it holds neither"
    return DataError(
        f"{folder} {state} prepared data nor a token table.",
        rule="Prepared data has a manifest.json (`mltfr prepare` writes it), a token table "
        "a table.json (`mltfr tables` does).",
        remedy=remedy,
    )


def command_tables(options: argparse.Namespace) -> None:
    """Language models to token tables."""
    from mltfr_dist.tables.build import build_tables

    build_tables(
        options.sources,
        options.output,
        section_from(TableConfig, options),
        name=options.name,
        packages=options.packages,
    )


def command_train(options: argparse.Namespace) -> None:
    """The same as `python train.py`."""
    from mltfr_dist.training.fit import fit

    fit(
        resolve_config(options.preset, options.config, options.overrides),
        resume=options.resume == "auto",
    )


def command_sweep(options: argparse.Namespace) -> None:
    """Search a space of configurations by trials that Ray Tune runs; interrupted, the same command goes on."""
    from mltfr_dist.tuning.sweep import load_sweep, plan_sweep, run_sweep

    sweep = load_sweep(Path(options.space), options.overrides)
    if options.dry_run:
        print(plan_sweep(sweep))
        return
    report = run_sweep(
        sweep,
        address=options.address,
        nodes=options.nodes,
        retry_failed=options.retry_failed,
    )
    print(report.read_text(), end="")


def command_evaluate(options: argparse.Namespace) -> None:
    """A run's numbers again, from its best checkpoint; of several ranks one prints."""
    from mltfr_dist.distributed.launch import expected_rank
    from mltfr_dist.distributed.ranks import lost_ranks_told, start_ranks
    from mltfr_dist.distributed.watchdog import watched
    from mltfr_dist.training.inference import evaluate_run

    with watched(expected_rank(), TrainingConfig().hang_seconds), lost_ranks_told():
        ranks = start_ranks()
        metrics = evaluate_run(Path(options.run), options.split, ranks)
        ranks.say(json.dumps(metrics, indent=2))


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
    """The report of a run, a sweep or a trial; for matrices of runs (.parquet) means, intervals, paired differences, slices."""
    from mltfr_dist.training.matrix import summary
    from mltfr_dist.tuning.folders import folder_report

    paths = [Path(run) for run in options.runs]
    if all(path.suffix == ".parquet" for path in paths):
        print(summary(paths))
        return
    if len(paths) > 1:
        raise ConfigError(
            f"{len(paths)} names were given, not all of them matrices.",
            rule="One run folder, or any number of .parquet files.",
            remedy="Name one run at a time.",
        )
    print(folder_report(paths[0]), end="")


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
    add_section(prepare, PrepareConfig, {"format": _FormatAction})
    add_section(prepare, PrepareResources)

    fetch = commands.add_parser(
        "fetch", help="public sets by name", description=command_fetch.__doc__
    )
    fetch.add_argument("names", nargs="*", metavar="NAME", help="sets; none: list them")
    fetch.add_argument(
        "--output", type=Path, default=SETS, help=f"folder for them (default: {SETS})"
    )

    inspect = commands.add_parser(
        "inspect",
        help="what a prepared folder or a token table holds",
        description=command_inspect.__doc__,
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
        "runs",
        metavar="run",
        nargs="+",
        help="run folder, such as runs/demo, or Parquet files that benchmarks/quality.py wrote, taken together",
    )
    return parser


def parse_intermixed(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> argparse.Namespace:
    """Parse a command line in which options may stand between the values of the list that ends it.

    argparse takes only the first run of such values, and its own remedy knows no subcommands.
    """
    options, rest = parser.parse_known_args(arguments)
    lists = [name for name in ("overrides", "sources", "runs") if hasattr(options, name)]
    if rest and (not lists or any(value[:1] == "-" != value for value in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest and getattr(options, "command", None) == "prepare":
        # argparse took the last word before an option for the output, which stands at the very end.
        rest = [options.output, *rest]
        options.output = rest.pop()
    for name in lists:
        setattr(options, name, [*getattr(options, name), *rest])
    return options


COMMANDS = {
    "prepare": command_prepare,
    "fetch": command_fetch,
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
    with quiet_pipe() as pipe:
        options = parse_intermixed(build_parser(), arguments)
        if options.command in ("train", "evaluate"):
            return _run_on_ranks(options)
        try:
            COMMANDS[options.command](options)
        except MltfrError as error:
            return fail(error)
    return pipe.exit_code


def _run_on_ranks(options: argparse.Namespace) -> int:
    """A command that a launcher may start several times: one rank speaks, for all."""
    from mltfr_dist.distributed.ranks import has_met, leave, say_why, stop_ranks

    code = 0
    try:
        COMMANDS[options.command](options)
    except MltfrError as error:
        code = say_why(error)
    finally:
        stop_ranks()
    if has_met():
        leave(code)
    return code
