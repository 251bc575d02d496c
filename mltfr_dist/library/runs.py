"""Runs: a configuration, training, and the models that come out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mltfr_dist.config import RunConfig
from mltfr_dist.errors import ConfigError
from mltfr_dist.library.words import path_text, words_of_a_call
from mltfr_dist.presets import PRESETS
from mltfr_dist.presets import preset as named_preset
from mltfr_dist.resolve import merge_values, read_configuration
from mltfr_dist.schema import Section, nested, or_nearest, validate
from mltfr_dist.training.origin import check_located
from mltfr_dist.training.run_folder import CONFIG, REPORT, Result

if TYPE_CHECKING:  # these import torch
    from mltfr_dist.exported import Exported, ExportInfo
    from mltfr_dist.training.using.index import IndexInfo
    from mltfr_dist.training.using.inference import LoadedRun

StrPath = str | os.PathLike[str]
Overrides = Mapping[str, Any]
"""New values by dotted key, such as ``{"training.epochs": 3}``, or nested as in a YAML file."""


@dataclass(frozen=True)
class Fitted:
    """What a run came to."""

    config: RunConfig
    results: tuple[Result, ...]
    """The outcome of each baseline, and of the configured model last."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.config.folder

    @property
    def valid(self) -> dict[str, float]:
        """Metrics of the chosen model on the validation split, such as ``valid["NDCG@10"]``."""
        return self.results[-1].valid

    @property
    def test(self) -> dict[str, float]:
        """Metrics of the chosen model on the test split."""
        return self.results[-1].test

    @property
    def report(self) -> str:
        """The text of the run's report.md."""
        return (self.folder / REPORT).read_text(encoding="utf-8")

    def load(self) -> LoadedRun:
        """The chosen model, as :func:`load_run` gives it."""
        return load_run(self.folder)


def preset(name: str, overrides: Overrides | None = None) -> RunConfig:
    """A complete configuration by name: demo, smoke, beauty, toys, sasrec_beauty, esasrec_beauty,
    paper.

    Args:
        name: Of the preset.
        overrides: New values by dotted key, such as ``{"data.path": "data/mine"}``.

    Raises:
        ConfigError: There is no such preset or key (the nearest is named), or a value is not valid.
    """
    with words_of_a_call():
        return _changed(named_preset(path_text(name, "name")), overrides)


def fit(
    config: RunConfig | Overrides | StrPath,
    overrides: Overrides | None = None,
    *,
    resume: bool = True,
) -> Fitted:
    """Train and compare as a configuration says, as `mltfr train` does.

    In a process of its own it runs on one rank, and the process is left as it was found. In a
    script that deepspeed, torchrun or srun started, every rank must call. A run that was
    interrupted goes on from its last checkpoint; one that is finished is only reported. Ctrl-C,
    SIGTERM, SIGHUP and SIGUSR1 make it save and raise, where it runs in the main thread.

    Args:
        config: A configuration, the name of a preset, a YAML file, or a mapping of all values.
        overrides: New values by dotted key, over it.
        resume: Whether a run that was begun goes on; otherwise it is refused.

    Raises:
        ConfigError: A configuration that cannot run, or a folder that holds another run.
        DataError: Data or token tables that are missing or damaged.
        CheckpointError: Checkpoints that cannot be used.
        StoppedError: A signal asked the run to stop; it has saved.
    """
    with words_of_a_call():
        chosen = _changed(_configuration(config), overrides)
        from mltfr_dist.distributed.guest import process_as_it_was, was_launched
        from mltfr_dist.training.running.fit import fit as train

        with process_as_it_was():
            results = train(chosen, resume=resume, watch=was_launched())
    return Fitted(chosen, tuple(results))


def load_run(folder: StrPath) -> LoadedRun:
    """The chosen model of a finished run, to score, recommend and evaluate with.

    Raises:
        CheckpointError: No run, an unfinished one, or inputs that changed since.
        DataError: Its data or tables are missing or damaged.
    """
    from mltfr_dist.training.using.inference import load_run as load

    with words_of_a_call():
        return load(path_text(folder, "folder"))


def load(folder: StrPath) -> LoadedRun | Exported:
    """The model that a folder holds, to recommend and score with: a finished run, or an export.

    Raises:
        CheckpointError: Neither of them, an unfinished run, or a damaged export.
        DataError: A run's data or tables are missing or damaged.
    """
    from mltfr_dist.exported import CONFIG as EXPORTED

    if (Path(path_text(folder, "folder")) / EXPORTED).exists():
        return load_exported(folder)
    return load_run(folder)


def export(
    run: StrPath, folder: StrPath, format: Literal["safetensors", "onnx"] = "safetensors"
) -> ExportInfo:
    """Write the chosen model of a finished run to ``folder``, as `mltfr export` does.

    Raises:
        ConfigError: ``folder`` exists, or ONNX cannot express the model, or is not installed.
        CheckpointError: No run, an unfinished one, or a damaged checkpoint.
    """
    from mltfr_dist.training.using.export import export as write

    with words_of_a_call():
        return write(path_text(run, "run"), path_text(folder, "folder"), format)


def index(
    model: StrPath, folder: StrPath, *, histories: StrPath | None = None, **options: Any
) -> IndexInfo:
    """Write a model's item vectors and a FAISS index of them to ``folder``, as `mltfr index` does.

    Args:
        model: Folder of a finished run, or of an export.
        folder: To write.
        histories: File of histories that recall is measured on; None: those of the run's validation
            split.
        options: Fields of :class:`~mltfr_dist.config.index.IndexConfig`, such as ``type="ivf"``.

    Raises:
        ConfigError: ``folder`` exists, FAISS is missing, an export without ``histories``, or
            options that do not fit.
        CheckpointError: Neither of both, an unfinished run, or a damaged checkpoint.
        DataError: The run's data, or the histories, cannot be used.
    """
    from mltfr_dist.config.index import IndexConfig
    from mltfr_dist.training.using.index import write_index

    with words_of_a_call():
        config = validate(IndexConfig, options, source="the call")
        given = None if histories is None else Path(path_text(histories, "histories"))
        run, output = Path(path_text(model, "model")), Path(path_text(folder, "folder"))
        return write_index(run, output, config, given)


def load_exported(folder: StrPath) -> Exported:
    """The model that :func:`export` wrote, to score and recommend with; without DeepSpeed.

    Raises:
        CheckpointError: Missing, damaged, or of another schema version.
    """
    from mltfr_dist.exported import load_exported as load

    with words_of_a_call():
        return load(path_text(folder, "folder"))


def push_to_hub(folder: StrPath, repository: str, *, private: bool = True) -> str:
    """Upload an export to the Hugging Face hub; returns its address.

    Args:
        folder: Of the export.
        repository: Such as "name/model"; made where it is not there.
        private: Whether a new one is.

    Raises:
        CheckpointError: ``folder`` is no export, or a damaged one.
        ConfigError: The hub cannot be reached, or refuses it.
    """
    from huggingface_hub import HfApi

    from mltfr_dist.exported import check_files, read_info

    with words_of_a_call():
        path = Path(path_text(folder, "folder"))
        check_files(path, read_info(path))
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=path))
    except Exception as error:  # what the client raises depends on its HTTP library and version
        raise ConfigError(
            f"{path} was not uploaded to `{repository}`: {type(error).__name__}, {error}",
            rule="A repository is `owner/name`, of an owner for whom you have a token that writes.",
            remedy="Log in by `hf auth login`, see that the hub is reached, and call it again.",
        ) from None


def _configuration(given: RunConfig | Overrides | StrPath) -> RunConfig:
    """A configuration in each of its forms.

    Raises:
        ConfigError: It is none of them, or not valid.
    """
    if isinstance(given, RunConfig):
        return given
    if isinstance(given, Mapping):
        return validate(RunConfig, _nested(given), source="the mapping")
    text = path_text(given, "config")
    path = Path(text)
    if isinstance(given, str) and text in PRESETS:
        return named_preset(text)
    if path.is_dir() or (path.suffix not in (".yaml", ".yml") and not path.is_file()):
        is_run = (path / CONFIG).is_file()
        raise ConfigError(
            f"`{text}` is neither a preset nor a YAML file"
            + (f", but the folder of a run ({path / CONFIG})." if is_run else ".")
            + ("" if is_run else or_nearest(text, list(PRESETS)).replace("; the", " The", 1)),
            rule=f"Presets: {', '.join(PRESETS)}. Files end in .yaml.",
            remedy=f"To go on with that run, give its {CONFIG}."
            if is_run
            else "Give a preset, a file, a mapping of values, or a RunConfig.",
        )
    config = validate(RunConfig, read_configuration(path), source=text)
    check_located(config.model_dump(mode="json"), path.parent)
    return config


def _changed(config: RunConfig, overrides: Overrides | None) -> RunConfig:
    if not overrides:
        return config
    if not isinstance(overrides, Mapping):
        raise ConfigError(
            f"The overrides are of type {type(overrides).__name__}.",
            rule="Overrides are a mapping of dotted keys to values.",
            remedy='Give them as in {"training.epochs": 3}.',
        )
    values = merge_values(config.model_dump(mode="json"), _nested(overrides))
    return validate(RunConfig, values, source="the overrides")


def _nested(given: Overrides) -> dict[str, Any]:
    """Dotted keys and sections to plain nested mappings."""
    values: dict[str, Any] = {}
    for key, value in given.items():
        if isinstance(value, Section):
            value = value.model_dump(mode="json")
        plain = _nested(value) if isinstance(value, Mapping) else value
        values = merge_values(values, nested({str(key): plain}))
    return values
