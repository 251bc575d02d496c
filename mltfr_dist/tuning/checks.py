"""What is refused before any trial, and before Ray starts: spaces, inputs, machines, folders."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mltfr_dist.config import RunConfig
from mltfr_dist.config.former import moved_to
from mltfr_dist.data.shards.manifest import verify_folder
from mltfr_dist.errors import ConfigError
from mltfr_dist.invocation import command
from mltfr_dist.metrics import metric_names
from mltfr_dist.schema import changed, field_paths, or_nearest, validate
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.run_folder import differing_fields, leaf_values, read_yaml
from mltfr_dist.tuning.records import BASE
from mltfr_dist.tuning.source import SWEEP
from mltfr_dist.tuning.space import SweepConfig, encoded, with_values

SET_BY_THE_SWEEP = ("name", "runs_dir", "baselines")
"""Fields that a sweep sets itself."""

WHAT_IS_MEASURED = ("evaluation.", "published.pick_on_test", "data.path", "data.left_out")
"""Fields whose values make objectives of trials that cannot be compared, or of the test split."""

MOST_COMBINATIONS = 256
"""Combinations of other fields that are tried before a value counts as one that no trial can run
with.
"""

MAY_CHANGE = ("resources_per_trial", "max_concurrent", "max_failures", "num_trials", "final_seeds")
"""What a sweep may be gone on with differently: it says nothing of the trials there are."""


def check_space(sweep: SweepConfig, base: RunConfig) -> None:
    """Refuse what no trial could run with, before any runs.

    Raises:
        ConfigError: A key that is no field, a value or range of the wrong type, a metric that is
            never reported.
    """
    leaves = leaf_values(base)
    for key in sweep.search:
        if key not in leaves:
            fields = [path for path in field_paths(RunConfig) if path in leaves]
            now = " or ".join(f"`{field}`" for field in moved_to(key))
            near = f"; in its place there is {now}" if now else or_nearest(key, fields)
            raise ConfigError(
                f"The searched key `{key}` is not a field of a run{near}.",
                remedy=f"Correct it; `{command('train')} --help all` lists every field.",
            )
        if key in SET_BY_THE_SWEEP:
            raise ConfigError(
                f"`{key}` cannot be searched.",
                rule="The sweep sets it itself.",
                remedy="Remove it from `search`.",
            )
        if key.startswith(WHAT_IS_MEASURED):
            raise ConfigError(
                f"`{key}` cannot be searched.",
                rule="All trials are measured alike: on the same data, by the same ranking, on "
                "validation.",
                remedy="Set it in `overrides`, for all of them.",
            )
    for key, domain in sweep.search.items():  # each beside all others, which are fields by now
        for value in domain.samples():
            check_value(sweep, base, key, value)
    for key in sweep.search:
        check_when(sweep, key, leaves)
    check_metric(sweep, base)


def check_value(sweep: SweepConfig, base: RunConfig, key: str, value: Any) -> None:
    """Refuse a value that is valid neither beside the base's other values nor beside any that are
    searched.

    Raises:
        ConfigError: What is wrong with it beside the base's.
    """
    try:
        with_values(base, {key: value})
        return
    except ConfigError as error:
        alone = error
    others = {name: domain.samples() for name, domain in sweep.search.items() if name != key}
    for some in itertools.islice(itertools.product(*others.values()), MOST_COMBINATIONS):
        with suppress(ConfigError):
            with_values(base, {key: value, **dict(zip(others, some))})
            return
    raise alone


def check_when(sweep: SweepConfig, key: str, base: Mapping[str, Any]) -> None:
    """Refuse a condition on a value that its field never has: the searched field would keep its
    base value in every trial.

    Args:
        sweep: The sweep.
        key: The searched field.
        base: The base's value of each field, which one that does not apply keeps.

    Raises:
        ConfigError: There is such a value.
    """
    for above, wanted in sweep.search[key].when.items():
        domain = sweep.search[above]
        for value in wanted if isinstance(wanted, list) else [wanted]:
            if domain.holds(value) or (domain.when and value == base[above]):
                continue
            options = domain.options()
            has = ", ".join(map(encoded, options)) if options else f"{domain.ends}"
            raise ConfigError(
                f"search.{key}.when wants {above} to be {encoded(value)}, which it never is.",
                rule=f"`{above}` is searched over {has}.",
                remedy="Name one of its values, or a list of some.",
            )


def check_metric(sweep: SweepConfig, base: RunConfig) -> None:
    """Refuse an objective that trials do not report.

    Raises:
        ConfigError: It is none, or of the test split.
    """
    reported = [f"valid/{name}" for name in metric_names(base.evaluation.cutoffs)]
    if base.published.pick_on_test:
        raise ConfigError(
            "published.pick_on_test is true.",
            rule="A sweep picks on validation, hundreds of times; the test split is read once, at "
            "the end.",
            remedy="Set published.pick_on_test=false.",
        )
    if re.match(r"test\b", sweep.metric):
        raise ConfigError(
            f"metric `{sweep.metric}` is of the test split.",
            rule="Validation picks; the test split is read once, at the end, for the chosen "
            "configuration.",
            remedy=f"Use one of {', '.join(reported)}.",
        )
    if sweep.metric not in reported:
        raise ConfigError(
            f"metric `{sweep.metric}` is never reported{or_nearest(sweep.metric, reported)}.",
            rule="Trials report the metrics of validation, at the K of evaluation.cutoffs.",
            remedy=f"Use one of {', '.join(reported)}.",
        )


def check_inputs(sweep: SweepConfig, base: RunConfig) -> None:
    """Verify data and every token table that a trial may read, once for all trials.

    Raises:
        MltfrError: Missing, damaged, or not fitting together.
    """
    verify_folder(base.data.path, left_out=base.data.left_out)
    load_inputs(with_all_tables(sweep, base), verify=True)


def with_all_tables(sweep: SweepConfig, base: RunConfig) -> RunConfig:
    """The base with every table that a trial may read."""
    domain = sweep.search.get("mltfr.tables")
    searched = [
        Path(table) for option in (domain.options() if domain else None) or [] for table in option
    ]
    tables = tuple(dict.fromkeys([*base.mltfr.tables, *searched]))
    fields = {"mltfr.tables": tables, "mltfr.consensus.group": ()}
    return changed(base, fields, source="the sweep")


def check_machine(sweep: SweepConfig) -> None:
    """Refuse trials that this machine cannot hold.

    Raises:
        ConfigError: More CPUs or GPUs a trial than it has.
    """
    check_resources(
        sweep, {"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}
    )


def check_resources(sweep: SweepConfig, there: dict[str, float]) -> None:
    """Refuse trials that a cluster cannot hold.

    Raises:
        ConfigError: More CPUs or GPUs a trial than it has.
    """
    each = sweep.resources_per_trial
    for name, amount in (("CPU", each.cpus), ("GPU", each.gpus)):
        need = each.workers * amount
        if need > there.get(name, 0):
            raise ConfigError(
                f"A trial needs {need:g} {name}s ({each.workers} workers x {amount:g}); there are "
                f"{there.get(name, 0):g}.",
                rule="A trial's workers run at the same time.",
                remedy="Lower resources_per_trial, or start the sweep on a larger cluster.",
            )


def check_folder(folder: Path, sweep: SweepConfig, base: RunConfig) -> None:
    """Refuse a folder that is not this sweep's.

    Raises:
        ConfigError: It holds another sweep.
    """
    if not (folder / SWEEP).exists():
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(
                f"{folder} exists and is not a sweep.", remedy="Give this sweep another `name`."
            )
        return
    there = validate(SweepConfig, read_yaml(folder / SWEEP), source=str(folder / SWEEP))
    hidden = dict.fromkeys(MAY_CHANGE)
    differences = differing_fields(
        there.model_dump(mode="json") | hidden, sweep.model_dump(mode="json") | hidden
    )
    differences += differing_fields(read_yaml(folder / BASE), base.model_dump(mode="json"))
    if differences:
        raise ConfigError(
            f"{folder} already holds a different sweep: {'; '.join(differences)}.",
            rule=f"A sweep's folder belongs to one space; only {', '.join(MAY_CHANGE)} may change.",
            remedy="Give this sweep another `name`, or delete the folder.",
        )
