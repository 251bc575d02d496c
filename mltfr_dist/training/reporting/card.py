"""The model card in `report.md`: intervals, differences, curves, fingerprint, machine, limits."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import torch

from mltfr_dist import __version__
from mltfr_dist.config import RunConfig
from mltfr_dist.data.shards.manifest import Manifest
from mltfr_dist.distributed.devices import uses_gpus
from mltfr_dist.statistics.spread import bootstrap_interval
from mltfr_dist.training.comparing.compare import (
    RESAMPLES,
    SHOWN,
    Comparison,
    Options,
    compare_models,
)
from mltfr_dist.training.comparing.load import read_ranks
from mltfr_dist.training.comparing.models import as_models
from mltfr_dist.training.comparing.text import differences, markdown, power
from mltfr_dist.training.comparing.values import user_values
from mltfr_dist.training.inputs import Inputs
from mltfr_dist.training.reporting.curves import CURVES, write_curves
from mltfr_dist.training.reporting.matrix import config_sha256
from mltfr_dist.training.reporting.tracking import METRICS
from mltfr_dist.training.run_folder import BACKBONE, RANKS, Result, dump_config

PACKAGES = ("torch", "deepspeed", "webdataset", "numpy", "scipy", "pyarrow")


def ranks_files(config: RunConfig, results: Sequence[Result]) -> dict[str, Path]:
    """The files of ranks of a run's models, the run's own first; empty where its own is not
    there.
    """
    *baselines, own = results
    paths = {own.name: config.folder / RANKS}
    for name, result in zip(config.baselines, baselines, strict=True):
        inside = config.folder / BACKBONE / RANKS
        path = inside if name == BACKBONE else config.folder / f"ranks-{name}.parquet"
        paths[result.name] = path
    there = {name: path for name, path in paths.items() if path.exists()}
    return there if own.name in there else {}


def protocol_line(config: RunConfig, manifest: Manifest) -> str:
    """By which rules the figures of a report came about."""
    seen = "left out" if config.evaluation.filter_seen else "kept"
    rules = [
        f"split {manifest.prepare.split_in_words}",
        f"candidates all {manifest.num_items:,} items",
        f"seen items {seen}",
        f"ties {config.evaluation.ties}",
        f"checkpoint by {config.evaluation.select_by} on {config.picks_on}",
        "leak check passed at preparation, on the shards as written",
    ]
    return f"Protocol: {'; '.join(rules)}."


def results_section(config: RunConfig, results: Sequence[Result]) -> list[str]:
    """The test metrics with intervals over users, and the run against its baselines."""
    paths = ranks_files(config, results)
    if not paths:
        return [
            "",
            f"The run ended before runs kept the ranks of users: `mltfr evaluate {config.folder} "
            "--save-ranks` writes them, and the same run started again reports its intervals.",
        ]
    measured = [read_ranks(path, "test") for path in paths.values()]
    random = np.random.default_rng(0)
    table = [["model", *SHOWN]]
    for name, one in zip(paths, measured, strict=True):
        row = [name]
        for metric in SHOWN:
            values = user_values(one.ranks[None], metric, one.owners)
            low, high = bootstrap_interval(values, RESAMPLES, random)
            row.append(f"{values.mean():.4f} [{low:.4f}, {high:.4f}]")
        table.append(row)
    lines = ["", "## Results with intervals", "", *markdown(table), ""]
    lines += [
        f"95% percentile bootstrap over {values.shape[1]:,} test users, {RESAMPLES:,} "
        "resamples: how other users would change the figure of this trained model.",
    ]
    if len(measured) < 2:
        return lines
    models = as_models(measured, list(paths))
    return lines + differences_section(compare_models(models, "test", Options()))


def differences_section(comparison: Comparison) -> list[str]:
    """Each baseline against the run, and what one run could have shown."""
    return [
        "",
        f"## Differences to {comparison.reference}",
        "",
        *markdown(differences(comparison)),
        "",
        *markdown(power(comparison)),
        "",
        "NDCG@10, paired by user: bootstrap interval, randomisation test with Holm's correction. "
        "Detectable is the smallest true difference that these users show with 80% power; how "
        "seeds "
        "differ is not in it, for there is one. `mltfr compare` takes several seeds and has "
        "slices.",
    ]


def curves_section(config: RunConfig) -> list[str]:
    """Loss and validation over the updates, as a picture."""
    paths = {config.name: config.folder / METRICS, "bare": config.folder / BACKBONE / METRICS}
    there = {name: path for name, path in paths.items() if path.exists()}
    write_curves(config.folder / CURVES, there, config.evaluation.select_by)
    return ["", "## Curves", "", f"![Training loss and {config.evaluation.select_by}]({CURVES})"]


def fingerprint_section(config: RunConfig, inputs: Inputs) -> list[str]:
    """What the run read, so that another can tell whether it has the same."""
    manifest = inputs.manifest
    rows = [["what", "sha256", "of it"]]
    of_data = (
        f"{manifest.num_users:,} users, {manifest.num_items:,} items, "
        f"{manifest.num_interactions:,} interactions"
    )
    rows.append(["prepared data (manifest)", inputs.hashes["data"], of_data])
    rows.append(
        [
            f"source {manifest.source.file}",
            manifest.source.sha256,
            f"{manifest.source.bytes:,} bytes",
        ]
    )
    for table in inputs.tables:
        shape = f"{len(table.rows):,} tokens of width {table.rows.shape[1]}, {table.content}"
        rows.append([f"table {table.name}", table.sha256, shape])
    rows.append(["configuration", config_sha256(config), "`config.yaml`, without its place"])
    return ["", "## Fingerprint", "", *markdown(rows)]


def machine_section(result: Result) -> list[str]:
    """Where and with what it ran."""
    gpus = torch.cuda.device_count() if uses_gpus() else 0
    accelerator = f"{gpus} x {torch.cuda.get_device_name()}" if gpus else "none"
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return [
        "",
        "## Machine",
        "",
        f"- {platform.system()} {platform.machine()}, {os.cpu_count()} logical processors, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB; GPUs: {accelerator}; "
        f"{result.world_size} rank(s).",
        f"- {result.seconds:.0f} s of training with validation, {result.epochs} epochs; peak "
        f"memory of a rank "
        f"{result.peak_memory_bytes / 2**30:.2f} GiB.",
        f"- mltfr_dist {__version__}, Python {sys.version.split()[0]}, {versions}.",
    ]


def limits_section(config: RunConfig, manifest: Manifest) -> list[str]:
    """What the figures do not say."""
    cold = manifest.report.cold_targets.get("test", 0)
    lines = [
        f"One seed ({config.training.seed}): how another would come out is not known; repeat with "
        f"several.",
        "Offline ranking of the next item of past users: it says nothing of what people would "
        "choose if it were shown to them, nor of new users.",
    ]
    if cold:
        lines.append(
            f"{cold:,} test targets were never seen in training; no model here can learn them."
        )
    if config.picks_on == "test":
        lines.append("The checkpoint was picked on the test split: its test figures are too high.")
    if config.data.left_out:
        lines.append(f"Left out as damaged: {', '.join(config.data.left_out)}.")
    if config.data.max_len < manifest.splits["test"].max_length - 1:
        lines.append(f"Of longer histories the last {config.data.max_len} items are read.")
    return ["", "## Limits", "", *(f"- {line}" for line in lines)]


def configuration_section(config: RunConfig) -> list[str]:
    """The whole configuration."""
    return ["", "## Configuration", "", "```yaml", dump_config(config).rstrip(), "```", ""]
