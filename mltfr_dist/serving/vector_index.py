"""Item vectors as a FAISS index of largest inner products, built in blocks from a file of vectors.

Row i of vectors and index is item i + 1. Shapes: I items, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mltfr_dist.config.index import IndexConfig
from mltfr_dist.errors import ConfigError

Floats = npt.NDArray[np.float32]

BLOCK_BYTES = 1 << 22
"""Vectors that are read together."""
POINTS = 64
"""Items drawn for each list or code word that is learned."""
LEAST_POINTS = 39
"""Items that FAISS wants for each list."""
CODE_WORDS = 256
"""Of each part of a vector: its code is one byte."""


class Plan(NamedTuple):
    """What is built."""

    factory: str
    """As FAISS writes it."""
    nlist: int | None
    learned: int
    """Lists or code words that are learned, the larger number; 0 where nothing is."""


def faiss() -> Any:
    """The library.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return import_module("faiss")
    except ImportError:
        raise ConfigError(
            "faiss is not installed.",
            rule="An index is built by FAISS.",
            remedy="`pip install 'mltfr-dist[index]'` (or `pip install faiss-cpu`).",
        ) from None


def plan(config: IndexConfig, num_items: int, dim: int) -> Plan:
    """What ``config`` asks for, of I items of D numbers.

    Raises:
        ConfigError: There are too few items for it, or D cannot be divided so.
    """
    for name, value in (("--k", config.k), ("--nlist", config.nlist)):
        if value is not None and value > num_items:
            raise ConfigError(
                f"{name} is {value:,}, and the model has {num_items:,} items.",
                rule="A list, and a rank among the best, needs an item.",
                remedy=f"Give {name} at most {num_items}.",
            )
    coarse, code, nlist = "", "Flat", None
    if config.type in ("ivf", "ivf_pq"):
        nlist = config.nlist or max(1, min(4 * math.isqrt(num_items), num_items // LEAST_POINTS))
        coarse = f"IVF{nlist},"
        if config.nprobe is not None and config.nprobe > nlist:
            raise ConfigError(
                f"--nprobe is {config.nprobe:,}, and there are {nlist:,} lists.",
                rule="A search reads at most every list (--nlist).",
                remedy=f"Give --nprobe at most {nlist}.",
            )
    if config.type in ("pq", "ivf_pq"):
        code = f"PQ{_code_bytes(config, num_items, dim)}x8"
    learned = max(nlist or 0, CODE_WORDS if code != "Flat" else 0)
    return Plan(coarse + code, nlist, learned)


def _code_bytes(config: IndexConfig, num_items: int, dim: int) -> int:
    if num_items < CODE_WORDS:
        raise ConfigError(
            f"--type is {config.type}, and the model has {num_items:,} items.",
            rule=f"Codes are learned from at least {CODE_WORDS} items.",
            remedy="Give --type flat or ivf.",
        )
    fitting = [size for size in range(1, dim + 1) if dim % size == 0]
    wanted = config.code_bytes or max(size for size in fitting if size <= max(1, dim // 4))
    if wanted not in fitting:
        raise ConfigError(
            f"--code-bytes is {wanted}, and vectors have {dim} numbers.",
            rule="A byte stands for a part of the vector, and all parts are of one size.",
            remedy=f"Give one of {', '.join(map(str, fitting))}.",
        )
    return wanted


def build(vectors: Floats, planned: Plan) -> Any:
    """The index of [I, D] vectors, which may be mapped from a file.

    Memory: what the index keeps (4 D bytes an item; of codes, --code-bytes), a block, and the drawn
    items of which lists and codes are learned.
    """
    library = faiss()
    index = library.index_factory(vectors.shape[1], planned.factory, library.METRIC_INNER_PRODUCT)
    if planned.learned:
        index.train(_drawn(vectors, POINTS * planned.learned))
    for _, block in blocks(vectors, BLOCK_BYTES):
        index.add(np.ascontiguousarray(block))
    return index


def blocks(vectors: Floats, size: int) -> Iterator[tuple[int, Floats]]:
    """Rows of about ``size`` bytes together, with the number of their first.

    Of a file that is mapped each is mapped by itself, so that no other page counts as held.
    """
    step = max(1, size // (4 * vectors.shape[1]))
    for start in range(0, len(vectors), step):
        shape = (min(step, len(vectors) - start), vectors.shape[1])
        if isinstance(vectors, np.memmap) and vectors.filename is not None:
            offset = vectors.offset + start * vectors.strides[0]
            yield start, np.memmap(vectors.filename, np.float32, "c", offset, shape)
        else:
            yield start, vectors[start : start + step]


def _drawn(vectors: Floats, count: int) -> Floats:
    """About ``count`` of the rows, all where there are not more."""
    if count >= len(vectors):
        return np.ascontiguousarray(vectors)
    indices = np.unique(np.random.default_rng(0).integers(0, len(vectors), count))
    drawn = np.empty((len(indices), vectors.shape[1]), dtype=np.float32)
    for start, block in blocks(vectors, BLOCK_BYTES):
        first, last = np.searchsorted(indices, (start, start + len(block)))
        drawn[first:last] = block[indices[first:last] - start]
    return drawn


def set_nprobe(index: Any, nprobe: int) -> None:
    """How many lists a search reads; the file of the index keeps it."""
    faiss().extract_index_ivf(index).nprobe = nprobe
