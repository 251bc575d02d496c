"""Fetches from the Hugging Face hub what a table needs: small files and its weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download

from mltfr_dist.errors import DataError
from mltfr_dist.tables import choose
from mltfr_dist.tables.checkpoints import from_gguf, layout
from mltfr_dist.tables.checkpoints.formats import FORMATS
from mltfr_dist.tables.checkpoints.from_safetensors import needed_tensors
from mltfr_dist.tables.checkpoints.source import read_settings

_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")
_FILE_ENDINGS = (*FORMATS, *layout.PICKLE_ENDINGS)


def parse_hub_id(source: str) -> tuple[str, str | None] | None:
    """``owner/name`` or ``owner/name@revision`` to its parts; None if it cannot be an id."""
    match = _REPOSITORY.fullmatch(source)
    if match is None or source.endswith(_FILE_ENDINGS):
        return None
    return match[1], match[2]


def fetch(repository: str, revision: str | None, tensor: str | None) -> tuple[Path, str]:
    """Download ``config.json``, the index, the tokenizer's files and the weights of the embedding.

    Args:
        repository: ``owner/name``.
        revision: branch, tag or commit; None: the default branch.
        tensor: the embedding's name; found when None.

    Returns:
        The weights' folder (or the GGUF file itself), and the commit it is of.

    Raises:
        DataError: the repository cannot be reached, or holds no readable weights or several.
    """
    try:
        info = HfApi().model_info(repository, revision=revision)
        commit, files = str(info.sha), [entry.rfilename for entry in info.siblings or ()]
        path = fetch_files(
            files,
            repository,
            tensor,
            lambda n: Path(hf_hub_download(repository, n, revision=commit)),
        )
    except DataError:
        raise
    except Exception as error:  # what the client raises depends on its HTTP library and version
        raise DataError(
            f"{repository!r} is no path here and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}).",
            remedy="Correct the path or the id; for a gated model run `hf auth login` first.",
        ) from None
    return path, commit


def fetch_files(
    files: Collection[str], repository: str, tensor: str | None, get: Callable[[str], Path]
) -> Path:
    """Choose among a repository's files and get those that the table needs, no others.

    Args:
        files: paths of all files, relative to the repository.
        repository: its id, for messages.
        tensor: as for :func:`fetch`.
        get: downloads one of ``files`` and gives its path here.

    Returns:
        As :func:`fetch`.

    Raises:
        DataError: as :func:`fetch`.
    """
    below = layout.model_folder(files, get)
    prefix = f"{below}/" if below else ""
    names = [name.removeprefix(prefix) for name in files if name.startswith(prefix)]
    choice = (
        f"Download the repository (`hf download {repository} --local-dir FOLDER`) "
        "and give the path of one of them."
    )
    chosen = layout.find_layout(names, repository, choice)
    small = [get(name) for name in layout.small_files(files, below)]
    if chosen.ending == ".gguf":
        return _fetch_gguf(chosen, tensor, lambda name: get(prefix + name))
    if chosen.adapter and chosen.adapter.endswith(".safetensors"):
        get(prefix + chosen.adapter)
    by_index = layout.read_index(get(prefix + chosen.index)) if chosen.index else {}
    if chosen.files:
        others = sorted(set(by_index.values()) & set(names) - set(chosen.files))
        if len(chosen.files) > 1 or others:
            shown = ", ".join([*chosen.files, *others][:12])
            raise DataError(
                f"{repository} holds {len(chosen.files) + len(others)} weight files that no one "
                f"index covers: {shown}.",
                rule="Which of them holds the embedding is seen in the files alone.",
                remedy=choice,
            )
        return get(prefix + chosen.files[0]).parent
    folder = small[0].parent if small else get(prefix + str(chosen.index)).parent
    architecture = choose.Architecture()
    if tensor is None and prefix + "config.json" in files:
        architecture = choose.names_from_config(folder, read_settings(folder))
    candidates, _ = choose.choose_tensors(
        by_index,
        asked=tensor,
        architecture=architecture,
        where=repository,
        describe=lambda: ", ".join(sorted(by_index)[:40]),
    )
    weights = {by_index[name] for name in needed_tensors(candidates, by_index)}
    paths = [get(prefix + name) for name in sorted(weights)]
    return paths[0].parent


def _fetch_gguf(chosen: layout.Layout, tensor: str | None, get: Callable[[str], Path]) -> Path:
    """Get the parts of a GGUF model until one holds the vocabulary and one the embedding."""
    has_tokens = has_tensor = False
    paths = []
    for name in chosen.files:
        paths.append(get(name))
        has_tokens = has_tokens or from_gguf.has_tokens(paths[-1])
        has_tensor = has_tensor or from_gguf.has_tensor(paths[-1], tensor)
        if has_tokens and has_tensor:
            break
    return paths[0]
