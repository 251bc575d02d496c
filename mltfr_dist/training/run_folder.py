"""`runs/NAME/`: config.yaml, metrics.jsonl, report.md, result.json, ranks.parquet, tb/,
checkpoints/.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from mltfr_dist.config import RunConfig
from mltfr_dist.config.io import dump_yaml, load_yaml
from mltfr_dist.distributed.lock import LOCK
from mltfr_dist.errors import CheckpointError, ConfigError
from mltfr_dist.files import write_atomically
from mltfr_dist.schema import Section, validate
from mltfr_dist.training.origin import as_stored, check_located, located, record_origin

STAGES = ("train", "consensus")
"""Stages of a run in order: the bare model or stage 1, then stage 2."""

CONFIG, RESULT, REPORT, CHECKPOINTS = "config.yaml", "result.json", "report.md", "checkpoints"
RANKS = "ranks.parquet"
"""The rank of each user's target (training/evaluating/user_ranks.py)."""
BACKBONE = "backbone"
"""Folder of the bare backbone's run inside the run's."""
INPUTS = "inputs.json"
"""Hashes of what the run reads (training/inputs.py)."""


class Result(Section):
    """The outcome of a model: what the report's table shows."""

    name: str
    valid: dict[str, float]
    test: dict[str, float]
    seconds: float
    """Wall time of training and validation (fitting, for baselines without a loop)."""
    stage: str = ""
    """Stage whose best checkpoint was chosen."""
    checkpoint: str = ""
    """Folder name under checkpoints/."""
    step: int = 0
    """Updates of the run behind it, over all stages; runs without it were evaluated as at 0."""
    epoch: int = 0
    """Epochs of that stage behind it."""
    epochs: int = 0
    """Epochs trained, over all stages."""
    test_slices: dict[str, dict[str, float]] = Field({})
    """Test metrics by slice of users (training/evaluating/slices.py), and each slice's number of
    ``users``.
    """
    routing: dict[str, float] = Field({})
    """Of the chosen model's gate on the validation split (training/evaluating/routing.py); empty
    without MLTFR.
    """
    parameters: int = 0
    """Trained parameters."""
    peak_memory_bytes: int = 0
    """Largest over ranks: GPU memory where there is a GPU, else resident memory."""
    world_size: int = 1


def dump_config(config: RunConfig) -> str:
    """The complete configuration as YAML; it loads back to an equal one."""
    return dump_yaml(config.model_dump(mode="json"))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        ConfigError: Missing, not YAML, or not a mapping.
    """
    try:
        content = load_yaml(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The configuration file {path} cannot be read: {error}.", remedy="Check the path."
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{path} is not valid YAML: {error}.", remedy="Correct the line it names."
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} does not hold a mapping.",
            rule="A configuration is `key: value` lines.",
            remedy="Correct it.",
        )
    return content


def load_config(folder: str | Path, *, locate: bool = False) -> RunConfig:
    """The configuration of a run.

    Args:
        folder: Of the run.
        locate: Whether its inputs are named as they are found from the working folder (origin.py).

    Raises:
        CheckpointError: The folder holds no run.
        DataError: An input is not found.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if not path.exists():
        from mltfr_dist.exported import CONFIG as EXPORTED  # imports torch

        missing = f"there is no {CONFIG}" if folder.exists() else "there is no such folder"
        remedy = "Name a run's folder, such as runs/demo."
        if (folder / EXPORTED).exists():
            missing = f"its {EXPORTED} is that of an exported model"
            remedy = "Name the run that it was exported from, such as runs/demo."
        raise CheckpointError(f"{folder} holds no run: {missing}.", remedy=remedy)
    values = read_yaml(path)
    config = validate(RunConfig, located(values, folder) if locate else values, source=str(path))
    if locate:
        check_located(config.model_dump(mode="json"), folder)
    return config


def load_result(folder: str | Path) -> Result | None:
    """The outcome of a finished run; None while it is not finished.

    Raises:
        CheckpointError: The file is damaged.
    """
    path = Path(folder) / RESULT
    if not path.exists():
        return None
    try:
        return Result.model_validate_json(path.read_text())
    except ValidationError as error:
        raise CheckpointError(
            f"{path} is damaged: {error}.",
            remedy="Delete it: the run evaluates its checkpoint again.",
        ) from None


def has_run(folder: Path) -> bool:
    """Whether a run lies there. Opened: a network client remembers what it only looked up."""
    try:
        with (folder / CONFIG).open("rb"):
            return True
    except OSError:
        return False


CHANGEABLE = (
    "name",
    "runs_dir",
    "deepspeed",
    "mltfr.placement",
    "item_table.placement",
    "data.num_workers",
    "data.read_attempts",
    "data.read_timeout",
    "training.threads",
    "training.hang_seconds",
    "training.log_every_steps",
    "checkpoint.every_steps",
    "checkpoint.keep_last",
    "checkpoint.keep_best",
    "checkpoint.background",
    "tracking.also",
    "tracking.projector_items",
)
"""Fields that may differ when a run goes on, for they change no number: where it lies, how the work
is divided and placed, how long is waited, what is recorded and saved."""


def check_claim(folder: Path, config: RunConfig, *, resume: bool) -> list[str]:
    """Whether ``folder`` can be this run's own; nothing is changed.

    Returns:
        What is another setting than before, and may be.

    Raises:
        ConfigError: It holds another run, or this one and ``resume`` is off.
    """
    if (folder / CONFIG).exists():
        stored, given = load_config(folder).model_dump(mode="json"), config.model_dump(mode="json")
        differences = differing_fields(stored, as_stored(given, stored, folder))
        refused = [text for text in differences if _key(text) not in CHANGEABLE]
        if refused:
            raise ConfigError(
                f"{folder} already holds a different run: {'; '.join(refused)}.",
                rule="A run goes on with the configuration that it began with; only what changes "
                f"no number may differ: {', '.join(CHANGEABLE)}.",
                remedy="Give this run another `name`, or delete the folder.",
            )
        if not resume:
            raise ConfigError(
                f"{folder} already holds this run.",
                remedy="Use `--resume auto` to go on with it, another `name`, or delete it.",
            )
        return [text for text in differences if _key(text) not in ("name", "runs_dir")]
    if folder.is_file() or (
        folder.exists()
        and any(not p.name.startswith(".partial-") and p.name != LOCK for p in folder.iterdir())
    ):
        raise ConfigError(
            f"{folder} exists and is not a run.", remedy="Give this run another `name`."
        )
    return []


def claim(folder: Path, config: RunConfig, *, resume: bool) -> list[str]:
    """Make ``folder`` this run's own, with the settings that it now has.

    Returns:
        See :func:`check_claim`.

    Raises:
        ConfigError: See :func:`check_claim`. Nothing is changed.
    """
    changed = check_claim(folder, config, resume=resume)
    if has_run(folder):
        stored, given = load_config(folder).model_dump(mode="json"), config.model_dump(mode="json")
        if given != stored and as_stored(given, stored, folder) == stored:
            return changed  # the same, seen from another folder
    text = dump_config(config)
    if not (folder / CONFIG).exists() or (folder / CONFIG).read_text() != text:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG, text)
    record_origin(folder)
    return changed


def _key(difference: str) -> str:
    return difference.partition(" ")[0]


def leaf_values(config: RunConfig) -> dict[str, Any]:
    """Dotted key of every field that is no section, and its value."""

    def leaves(values: dict[str, Any], prefix: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in values.items():
            result |= (
                leaves(value, f"{prefix}{key}.")
                if isinstance(value, dict)
                else {prefix + key: value}
            )
        return result

    return leaves(config.model_dump(mode="json"), "")


def differing_fields(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for every leaf that differs."""
    differing = []
    for key in [*old, *(k for k in new if k not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            differing += differing_fields(before, after, f"{prefix}{key}.")
        elif before != after:
            differing.append(
                f"{prefix}{key} is {json.dumps(before)} there and {json.dumps(after)} here"
            )
    return differing
