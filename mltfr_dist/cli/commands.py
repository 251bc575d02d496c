"""What each command does: one function a command; what it needs is imported when it is called."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from mltfr_dist.cli.fields import section_from
from mltfr_dist.cli.screen import show
from mltfr_dist.cli.serving_commands import (
    command_explain,
    command_export,
    command_index,
    command_recommend,
    refuse,
)
from mltfr_dist.config import (
    PrepareConfig,
    PrepareResources,
    TableConfig,
    TrainingConfig,
)
from mltfr_dist.errors import ConfigError, DataError
from mltfr_dist.progress import say
from mltfr_dist.resolve import resolve_config
from mltfr_dist.startup import started


def command_prepare(options: argparse.Namespace) -> None:
    """Interactions to shards."""
    from mltfr_dist.data.prepare.run import prepare
    from mltfr_dist.data.sources.fetch import known_set

    config, resources = (
        section_from(PrepareConfig, options),
        section_from(PrepareResources, options),
    )
    if options.output == "-":
        raise ConfigError(
            "The output is a folder, and cannot be standard output.", remedy="Name a folder."
        )
    sources, config = known_set(
        options.sources, config, download=options.download, folder=options.sets
    )
    prepare(sources, options.output, config, resources=resources, packages_dir=options.packages)


def command_fetch(options: argparse.Namespace) -> None:
    """Public sets by name, from where their owners offer them; what was cut off goes on."""
    from mltfr_dist.data.sources.fetch import fetch_set, sets_text

    if not options.names:
        show(sets_text())
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

        refuse(options.output, "--output", "plots prepared data", f"{folder} is a token table")
        show(inspect_table(folder, options.neighbours))
    elif (folder / "manifest.json").exists():
        from mltfr_dist.data.inspect.report import inspect

        words = "looks up a word in a token table"
        refuse(options.neighbours, "--neighbours", words, f"{folder} is prepared data")
        show(inspect(folder, options.output))
    else:
        raise _neither(folder)


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
    """Language models to token tables; with --inspect, what the geometry of stored ones has to
    offer.
    """
    if options.inspect:
        from mltfr_dist.tables.geometry_report import inspect_tables

        words = options.words or ()
        show(inspect_tables(options.sources, words=words, pictures=options.pictures))
        return
    from mltfr_dist.tables.build import build_tables

    refuse(options.words, "--words", "belongs to --inspect", "tables are to be built")
    refuse(options.pictures, "--pictures", "belongs to --inspect", "tables are to be built")

    build_tables(
        options.sources,
        options.output,
        section_from(TableConfig, options),
        name=options.name,
        packages=options.packages,
    )


def command_train(options: argparse.Namespace) -> None:
    """The same as `python train.py`."""
    config = resolve_config(options.preset, options.config, options.overrides)
    if options.print_config:
        from mltfr_dist.training.run_folder import dump_config

        print(dump_config(config), end="")
        return
    from mltfr_dist.training.running.fit import fit

    fit(config, resume=options.resume == "auto")


def command_sweep(options: argparse.Namespace) -> None:
    """Search a space of configurations by trials that Ray Tune runs; interrupted, the same command
    goes on.
    """
    from mltfr_dist.tuning.source import go_where_begun, load_sweep

    sweep = load_sweep(go_where_begun(Path(options.space)), options.overrides)
    say(f"sweep `{sweep.name}`: space and inputs are checked ...")
    from mltfr_dist.tuning.sweep import plan_sweep, run_sweep  # PyTorch: seconds

    if options.dry_run:
        show(plan_sweep(sweep))
        return
    report = run_sweep(
        sweep,
        address=options.address,
        nodes=options.nodes,
        retry_failed=options.retry_failed,
    )
    show(report.read_text().rstrip("\n"))


def command_evaluate(options: argparse.Namespace) -> None:
    """A run's numbers again, from its best checkpoint, or a baseline's on the same data; of several
    ranks one prints.
    """
    from mltfr_dist.distributed.launch import expected_rank
    from mltfr_dist.distributed.meeting import lost_ranks_told, start_ranks
    from mltfr_dist.distributed.watchdog import watched
    from mltfr_dist.training.using.baseline import evaluate_baseline
    from mltfr_dist.training.using.inference import evaluate_run

    folder, split, baseline = Path(options.run), options.split, options.baseline
    if baseline:
        writes = "writes the ranks of the run's model"
        refuse(options.save_ranks or None, "--save-ranks", writes, "--baseline is given")
    with watched(expected_rank(), TrainingConfig().hang_seconds), lost_ranks_told():
        ranks = start_ranks()
        started()
        if baseline:
            metrics = evaluate_baseline(folder, baseline, split, ranks, lists=options.lists)
        else:
            more = {"keep_ranks": options.save_ranks, "lists": options.lists}
            metrics = evaluate_run(folder, split, ranks, **more)
        ranks.say(json.dumps(metrics, indent=2))


def command_report(options: argparse.Namespace) -> None:
    """The report of a run, a sweep or a trial; for matrices of runs (.parquet) means, intervals,
    paired differences, slices.
    """
    from mltfr_dist.training.comparing.compare import Options
    from mltfr_dist.training.reporting.matrix import summary
    from mltfr_dist.tuning.folders import folder_report

    paths = [Path(run) for run in options.runs]
    if all(path.suffix == ".parquet" for path in paths):
        show(summary(paths, Options(margin=options.margin, difference=options.difference)))
        return
    for name in ("margin", "difference"):
        words = "belongs to differences between the runs of a matrix"
        refuse(getattr(options, name), f"--{name}", words, f"{paths[0]} is no matrix")
    if len(paths) > 1:
        raise ConfigError(
            f"{len(paths)} names were given, not all of them matrices.",
            rule="One run folder, or any number of .parquet files.",
            remedy="Name one run at a time.",
        )
    show(folder_report(paths[0]).rstrip("\n"))


def command_compare(options: argparse.Namespace) -> None:
    """Runs that are over, user by user: differences to the first model, intervals, tests, power,
    slices.
    """
    from mltfr_dist.training.comparing import text
    from mltfr_dist.training.comparing.compare import Options, compare_runs

    asked = Options(
        options.metric, options.resamples, options.seed, options.margin, options.difference
    )
    comparison = compare_runs(options.runs, options.split, asked)
    show(text.as_text(comparison))
    if options.output:
        written = text.write(comparison, options.output)
        show(f"\nWritten: {', '.join(map(str, written))}")


KEPT = {
    "prepare": "the preparation: steps and shards that are finished stay",
    "fetch": "the download: what has arrived stays",
    "train": "the run: what it has saved stays",
    "sweep": "the sweep: what its trials have saved stays",
    "recommend": "the work: parts that are written stay",
}
"""What a signal ends of a command that goes on when it is typed again, and what of that stays."""


def kept_by(options: argparse.Namespace) -> str:
    """What a signal ends of a command, and what stays; empty: nothing would."""
    if options.command == "recommend" and not options.histories:
        return ""
    return KEPT.get(options.command, "")


COMMANDS = {
    "prepare": command_prepare,
    "fetch": command_fetch,
    "inspect": command_inspect,
    "tables": command_tables,
    "train": command_train,
    "sweep": command_sweep,
    "evaluate": command_evaluate,
    "recommend": command_recommend,
    "explain": command_explain,
    "export": command_export,
    "index": command_index,
    "report": command_report,
    "compare": command_compare,
}
