"""Fetches from the Hugging Face hub what one token table needs: small files and the one weight file that holds it."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download

from mltfr_dist.errors import DataError
from mltfr_dist.tables import choose

_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")


def parse_hub_id(source: str) -> tuple[str, str | None] | None:
    """``owner/name`` or ``owner/name@revision`` to its parts; None when ``source`` cannot be a hub id."""
    found = _REPOSITORY.fullmatch(source)
    if found is None or source.endswith((".safetensors", ".gguf", *choose.PICKLE_ENDINGS)):
        return None
    return found[1], found[2]


def fetch(repository: str, revision: str | None, tensor: str | None) -> tuple[Path, str]:
    """Download ``config.json``, the index, the tokenizer's files and the weight file that holds the embedding.

    Args:
        repository: ``owner/name``.
        revision: branch, tag or commit; None: the default branch.
        tensor: the embedding's name; found when None.

    Returns:
        The weight's folder (or the GGUF file itself), and the commit it is of.

    Raises:
        DataError: the repository cannot be reached or holds no readable weights.
    """
    try:
        info = HfApi().model_info(repository, revision=revision)
        commit, files = str(info.sha), [entry.rfilename for entry in info.siblings or ()]

        def get(name: str) -> Path:
            return Path(hf_hub_download(repository, name, revision=commit))

        small = {name: get(name) for name in choose.small_files(files)}
        index = choose.read_index(small[choose.INDEX_FILE]) if choose.INDEX_FILE in small else None
        architecture = (
            choose.names_from_config(small["config.json"].parent)[0]
            if "config.json" in small
            else ()
        )
        weight = get(
            choose.weight_file(
                files,
                index,
                lambda names: choose.choose_tensor(
                    names,
                    asked=tensor,
                    architecture=architecture,
                    describe=lambda: ", ".join(sorted(names)[:40]),
                ),
            )
        )
    except DataError:
        raise
    except Exception as error:  # what the client raises for a failed request depends on its HTTP library and version
        raise DataError(
            f"{repository!r} is no path here and could not be fetched from the Hugging Face hub ({type(error).__name__}).",
            remedy="Correct the path or the id; for a gated model run `hf auth login` first.",
        ) from None
    return (weight if weight.suffix == ".gguf" else weight.parent), commit
