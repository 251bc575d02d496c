"""What the commands do that use a finished model: one function a command; what it needs is
imported when it is called.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from mltfr_dist.cli.fields import section_from
from mltfr_dist.cli.screen import show
from mltfr_dist.config.index import IndexConfig
from mltfr_dist.errors import ConfigError


def refuse(value: object, option: str, does: str, but: str) -> None:
    """Whether an option was left out that does not fit.

    Raises:
        ConfigError: It was given.
    """
    if value is not None:
        raise ConfigError(f"{option} {does}, but {but}.", remedy=f"Leave {option} out.")


def command_recommend(options: argparse.Namespace) -> None:
    """The best items after a history, or after each of a file of them."""
    if (options.history is None) == (options.histories is None):
        raise ConfigError(
            "Give one of --history and --histories.",
            rule="--history is one list of ids, --histories a file of many.",
            remedy="As in `--history 50,172,181`, or `--histories users.parquet --output "
            "recs.parquet`.",
        )
    if (options.histories is None) != (options.output is None):
        raise ConfigError(
            "--histories and --output go together.", remedy="Give both, or --history alone."
        )
    if options.histories is not None:
        _recommend_file(options)
        return
    from mltfr_dist.training.using.inference import open_model, recommendation_text

    for name in ("unknown", "empty"):
        asked = None if getattr(options, name) == "refuse" else name
        refuse(asked, f"--{name}", "belongs to --histories", "--history is given")
    history = [item_id.strip() for item_id in options.history.split(",") if item_id.strip()]
    model = open_model(Path(options.run))
    show(
        recommendation_text(
            model, history, k=options.k, explain=options.explain, keep_seen=options.keep_seen
        )
    )


def _recommend_file(options: argparse.Namespace) -> None:
    from mltfr_dist.distributed.devices import local_device
    from mltfr_dist.distributed.launch import is_launched
    from mltfr_dist.serving.batch import BatchOptions, recommend_file
    from mltfr_dist.training.using.inference import open_model

    refuse(options.explain or None, "--explain", "explains one history", "--histories is given")
    launched = is_launched()
    rank, world_size = (int(os.environ[n]) for n in ("RANK", "WORLD_SIZE")) if launched else (0, 1)
    recommend_file(
        open_model(Path(options.run), local_device()),
        options.histories,
        options.output,
        BatchOptions(options.k, not options.keep_seen, options.unknown, options.empty),
        rank=rank,
        world_size=world_size,
    )


def command_explain(options: argparse.Namespace) -> None:
    """What a run's filter keeps for sample users, and what each table and each item changes: a
    page, and TensorBoard texts.
    """
    from mltfr_dist.training.using.explain_run import explain_run

    page = explain_run(Path(options.run), options.output, options.control, options.users)
    show(f"{page}: open it in a browser; TensorBoard has it in short (texts of `explain`)")


def command_export(options: argparse.Namespace) -> None:
    """The chosen model of a finished run, to be used without DeepSpeed, the data or the tables'
    folders.
    """
    from mltfr_dist.training.using.export import export, size_line

    info = export(Path(options.run), Path(options.output), options.format)
    spec = info.spec
    show(
        f"{options.output}: {spec.backbone.name}, {spec.num_items} items, "
        f"{len(spec.tables)} token tables, {size_line(info, Path(options.output))}"
    )


def command_index(options: argparse.Namespace) -> None:
    """The item vectors of a run or an exported model for searches of nearest neighbours: as a
    matrix with ids, and as a FAISS index whose recall of the exact ranking is measured.
    """
    from mltfr_dist.training.using.index import report, write_index

    config = section_from(IndexConfig, options)
    info = write_index(Path(options.run), options.output, config, options.histories)
    show(f"{options.output}: {report(info)}".rstrip("\n"))
