"""`mltfr export --format onnx`: the model for programs without Python or PyTorch, checked with
onnxruntime.
"""

from __future__ import annotations

import logging
import warnings
from importlib import import_module
from pathlib import Path

import torch

from mltfr_dist.config.published import PublishedConfig
from mltfr_dist.errors import CheckpointError, ConfigError
from mltfr_dist.exported import ONNX_MODEL
from mltfr_dist.serving.dense import DenseModel
from mltfr_dist.serving.scoring import drawn_histories, score_histories
from mltfr_dist.training.using.inference import LoadedRun

NEEDED = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-5
"""Largest difference of a score from the run's, relative to scores above 1."""

STRATEGIES = ("user_guided", "direct", "learned_prototypes", "seed_words")
PUBLISHED = (
    *("straight_through", "noise_in_evaluation", "pooled_memory", "unaligned_experts"),
    *("whole_history_query", "attending_padding"),
)
"""Defects whose forward pass depends on the batch, on random numbers or on padding."""


def check_expressible(loaded: LoadedRun) -> None:
    """Whether ONNX can say what the model computes, and is installed.

    Raises:
        ConfigError: It cannot, or is not.
    """
    config = loaded.config
    strategy = config.mltfr.filter.strategy
    named = [f"published.{name}=true" for name in _published(config.published)]
    if config.mltfr.enabled and strategy not in STRATEGIES:
        named.append(f"mltfr.filter.strategy={strategy}")
    if named:
        raise ConfigError(
            f"The run {config.folder} has {', '.join(named)}, which ONNX cannot express.",
            rule="An ONNX graph draws no rows by a hash of the history, and sees no batch.",
            remedy="Export it as safetensors: leave `--format onnx` out.",
        )
    missing = []
    for name in NEEDED:
        try:
            import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} {'are' if len(missing) > 1 else 'is'} not installed.",
            rule="ONNX models are written with onnx and onnxscript, and checked with onnxruntime.",
            remedy="`pip install 'mltfr-dist[onnx]'`, or export as safetensors.",
        )


def _published(published: PublishedConfig) -> list[str]:
    return [name for name in PUBLISHED if getattr(published, name)]


def write_onnx(loaded: LoadedRun, folder: Path) -> None:
    """`model.onnx`: item_ids [batch, length] int64, padding behind -> scores [batch, num_items +
    1], user_vectors [batch, D].
    """
    model = DenseModel(loaded.model.cpu(), loaded.max_len).eval()
    example = torch.ones(2, min(2, loaded.max_len), dtype=torch.int64)
    batch = torch.export.Dim("batch")
    length = torch.export.Dim("length", min=1, max=max(2, loaded.max_len))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # of operators that are not used
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: batch, 1: length},),
            input_names=["item_ids"],
            output_names=["scores", "user_vectors"],
            verbose=False,
        )
    assert program is not None
    program.save(str(folder / ONNX_MODEL))


def check_onnx(loaded: LoadedRun, folder: Path) -> None:
    """Score histories of all lengths with onnxruntime, in batches of 1, 2 and more, and with the
    run's model.

    Raises:
        CheckpointError: A score differs by more than :data:`TOLERANCE`.
    """
    session = import_module("onnxruntime").InferenceSession(
        str(folder / ONNX_MODEL), providers=["CPUExecutionProvider"]
    )
    histories, largest = drawn_histories(loaded.items.num_items, loaded.max_len), 0.0
    for rows in (histories[:1], histories[1:3], histories):
        length = int((rows != 0).sum(1).max())
        item_ids = rows[:, :length].contiguous()
        scores = torch.from_numpy(session.run(["scores"], {"item_ids": item_ids.numpy()})[0])
        expected = score_histories(loaded.model, item_ids).cpu()
        differ = (scores - expected)[:, 1:].abs() / expected[:, 1:].abs().clamp(min=1)
        largest = max(largest, float(differ.max()))
    if not largest <= TOLERANCE:
        raise CheckpointError(
            f"The ONNX model's scores differ from those of the run {loaded.config.folder} by "
            f"{largest:.1e}; nothing was exported.",
            rule=f"An ONNX export scores as its run does, to {TOLERANCE:.0e}.",
            remedy="Export it as safetensors, which is equal to the bit.",
        )
