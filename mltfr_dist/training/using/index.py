"""`mltfr index`: a model's item vectors for searches of nearest neighbours, and as a FAISS index
whose recall is measured.

The folder holds `item_vectors.npy` [I, D] float32, `items.parquet` (row i of the vectors is
item_index i + 1), `index.faiss`, `index.json` (what they are, with hashes and figures) and
`report.md`. A score is the inner product of a user's and an item's vector; there is no bias.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mltfr_dist import __version__
from mltfr_dist.config.index import IndexConfig
from mltfr_dist.data.batch import PADDING_IDX
from mltfr_dist.data.stream.ranking import RankingStream
from mltfr_dist.errors import CheckpointError, ConfigError, DataError
from mltfr_dist.exported import ITEMS
from mltfr_dist.files import file_sha256, new_folder
from mltfr_dist.ranking import Ranker
from mltfr_dist.schema import Section
from mltfr_dist.serving.files import read_rows
from mltfr_dist.serving.histories import Histories
from mltfr_dist.serving.items import as_texts
from mltfr_dist.serving.recall import RECALL, Measured, exact, of_index
from mltfr_dist.serving.vector_index import BLOCK_BYTES, Floats, Plan, build, faiss, plan
from mltfr_dist.training.using.inference import LoadedRun, open_model

VECTORS, INDEX, HEADER, REPORT = "item_vectors.npy", "index.faiss", "index.json", "report.md"


class IndexInfo(Section):
    """``index.json``."""

    schema_version: int = 1
    mltfr_dist: str
    """Release that wrote it."""
    model: str
    """Folder of the run or export."""
    num_items: int
    dim: int
    factory: str
    """What the index is, as FAISS writes it; its metric is the inner product."""
    nprobe: int | None
    k: int
    histories: str
    """What recall was measured on."""
    num_histories: int
    threads: int
    build_seconds: float
    index_bytes: int
    measured: list[dict[str, str | float]]
    """Name, recall, and milliseconds a history, of each way; the index keeps the last one's."""
    sha256: dict[str, str]
    """File name to hash."""


class Sample(NamedTuple):
    """Histories to measure on."""

    histories: Histories
    what: str
    """Which they are."""


def write_index(
    folder: Path, output: Path, config: IndexConfig, histories: Path | None = None
) -> IndexInfo:
    """Write ``output`` from the run or export ``folder``.

    Args:
        folder: Of either.
        output: To write; it must not exist.
        config: What to build.
        histories: File of histories to measure recall on; None: those of the run's validation
            split.

    Raises:
        ConfigError: ``output`` exists, FAISS is missing, an export without ``histories``, or the
            model has too few items for ``config``.
        CheckpointError: No run or export, or one that cannot be used.
        DataError: The data, or the histories, cannot be used.
    """
    if output.exists():
        raise ConfigError(
            f"{output} exists.",
            rule="An index never overwrites.",
            remedy="Name another folder, or delete it.",
        )
    faiss()
    model = open_model(folder, items_stay=True)
    planned = plan(config, model.items.num_items, _dim(model))
    if histories is None:
        sample = of_run(model, folder, config.users)
    else:
        sample = of_file(model, histories, config.users)
    with new_folder(output) as partial:
        vectors = write_vectors(model, partial / VECTORS)
        model.items.write(partial / ITEMS)
        info = _build(model, folder, config, planned, sample, vectors, partial)
        (partial / HEADER).write_text(info.model_dump_json(indent=2) + "\n")
        (partial / REPORT).write_text(f"# {output.name}\n\n{report(info)}", encoding="utf-8")
    return info


@torch.no_grad()
def write_vectors(model: Ranker, path: Path) -> Floats:
    """Write the vectors of items 1..I to a NumPy file, a block at a time; returns them mapped from
    it.

    Raises:
        CheckpointError: One is not finite.
    """
    serving, num_items = model.serving, model.items.num_items
    dim = _dim(model)
    shape = {"shape": (num_items, dim), "fortran_order": False, "descr": "<f4"}
    rows = max(1, BLOCK_BYTES // (4 * dim))
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, shape)
        for start in range(1, num_items + 1, rows):
            ids = torch.arange(start, min(start + rows, num_items + 1))
            block = serving.vectors(ids).float().cpu()
            if not block.isfinite().all():
                raise CheckpointError(
                    "Vectors of items are not finite: the model has diverged.",
                    remedy="Train it with a lower learning rate, or optimizer.max_grad_norm.",
                )
            file.write(block.contiguous().numpy().data)
    mapped: Floats = np.load(path, mmap_mode="c", allow_pickle=False)
    return mapped


def _dim(model: Ranker) -> int:
    return model.model.vectors(torch.tensor([1])).shape[1]


def of_run(model: Ranker, folder: Path, count: int) -> Sample:
    """The first validation histories of a run's data.

    Raises:
        ConfigError: ``model`` is an export, which has no data.
        DataError: There are none.
    """
    if not isinstance(model, LoadedRun):
        raise ConfigError(
            f"{folder} is an export, and holds no histories to measure recall on.",
            rule="Recall is measured on real histories.",
            remedy="Give --histories FILE (as `mltfr recommend` takes it), or the run itself.",
        )
    data = model.config.data
    stream = RankingStream(
        data.path,
        "valid",
        max_len=data.max_len,
        batch_size=min(count, 1024),
        left_out=data.left_out,
        once_a_user=True,
    )
    numbers: list[list[int]] = []
    for batch in stream:
        rows = (row[row != PADDING_IDX].tolist() for row in batch.item_ids)
        numbers += [row for row in rows if row]
        if len(numbers) >= count:
            break
    if not numbers:
        raise DataError(
            f"{data.path} has no validation histories to measure recall on.",
            remedy="Give --histories FILE.",
        )
    return Sample(Histories(numbers[:count], None, 0), f"validation histories of {data.path}")


def of_file(model: Ranker, path: Path, count: int) -> Sample:
    """The first histories of a file.

    Raises:
        DataError: It cannot be read, holds none, or an id that is not known.
    """
    texts: list[list[str]] = []
    for row in read_rows(path):
        if row.history:
            texts.append(as_texts(row.history))
        if len(texts) >= count:
            break
    return Sample(model.encode(texts), f"histories of {path}")


def _build(
    model: Ranker,
    folder: Path,
    config: IndexConfig,
    planned: Plan,
    sample: Sample,
    vectors: Floats,
    partial: Path,
) -> IndexInfo:
    """Build, measure and write the index; returns what `index.json` is to say."""
    began = time.perf_counter()
    index = build(vectors, planned)
    seconds = time.perf_counter() - began
    users = model.user_vectors(sample.histories)
    best, exactly = exact(users, vectors, config.k)
    measured = of_index(index, users, best, config.nprobe, config.recall or RECALL, planned.nlist)
    library = faiss()
    library.write_index(index, str(partial / INDEX))
    return IndexInfo(
        mltfr_dist=__version__,
        model=str(folder),
        num_items=len(vectors),
        dim=vectors.shape[1],
        factory=planned.factory,
        nprobe=None if planned.nlist is None else library.extract_index_ivf(index).nprobe,
        k=config.k,
        histories=sample.what,
        num_histories=len(users),
        threads=library.omp_get_max_threads(),
        build_seconds=seconds,
        index_bytes=(partial / INDEX).stat().st_size,
        measured=[vars(way) for way in (exactly, *measured)],
        sha256={path.name: file_sha256(path) for path in sorted(partial.iterdir())},
    )


def report(info: IndexInfo) -> str:
    """What was built, and what it finds."""
    ways = [Measured(**way) for way in info.measured]  # type: ignore[arg-type]
    lines = [
        f"FAISS `{info.factory}`, inner product, of {info.num_items:,} items x {info.dim}, from "
        f"{info.model}: {info.index_bytes / 1e6:.1f} MB, built in {info.build_seconds:.1f} s.",
        "",
        f"Recall of the {info.k} exactly best items (seen ones not left out), on "
        f"{info.num_histories:,} {info.histories}; {info.threads} threads:",
        "",
        f"| search | recall@{info.k} | ms a history, together | ms, one alone |",
        "|---|---|---|---|",
        *(
            f"| {way.name} | {way.recall:.4f} | {way.batch_ms:.3f} | {way.alone_ms:.3f} |"
            for way in ways
        ),
    ]
    if info.nprobe is not None:
        lines += ["", f"The index is stored with nprobe {info.nprobe}."]
    return "\n".join(lines) + "\n"
