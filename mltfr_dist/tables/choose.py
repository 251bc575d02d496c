"""Which tensor of a checkpoint is the input embedding, and which file holds it: decided by names alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from mltfr_dist.errors import DataError

KNOWN_NAMES = (
    "embed_tokens.weight",
    "tok_embeddings.weight",
    "word_embeddings.weight",
    "wte.weight",
    "embed_in.weight",
    "tokens_embed.weight",
    "token_embedding.weight",
    "token_embd.weight",
    "shared.weight",
    "embedding.weight",
)
"""Last parts of tensor names that language models give their input embedding."""

INDEX_FILE = "model.safetensors.index.json"
WEIGHT_FILE = "model.safetensors"
PICKLE_ENDINGS = (".bin", ".pth", ".pt", ".ckpt")


def names_from_config(folder: Path) -> tuple[tuple[str, ...], str]:
    """Names that ``transformers`` gives the input embedding of the architecture in ``folder/config.json``.

    The model is built on the meta device, so no weight is allocated, and never from code in the checkpoint.

    Returns:
        The names (several when the architecture ties the tensor) and the model class; empty and the reason when
        ``transformers`` does not know the architecture.
    """
    if not (folder / "config.json").is_file():
        return (), "no config.json"
    # Imported here: transformers takes seconds to load, and most sources do not need it.
    import torch
    from transformers import AutoConfig, AutoModel

    try:
        settings = AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        with torch.device("meta"):
            model = AutoModel.from_config(settings, trust_remote_code=False)
        weight = model.get_input_embeddings().weight
    except Exception as error:  # transformers raises what it likes: ValueError, KeyError, ImportError, AttributeError, OSError
        return (), f"transformers cannot build it ({type(error).__name__})"
    names = tuple(
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is weight
    )
    return names, type(model).__name__


def choose_tensor(
    names: Collection[str],
    *,
    asked: str | None,
    architecture: Sequence[str] = (),
    describe: Callable[[], str],
) -> str:
    """The input embedding's name.

    Args:
        names: every tensor of the checkpoint.
        asked: the name that the user gave; it must exist.
        architecture: names from :func:`names_from_config`; prefixes such as ``model.`` may differ from the checkpoint's.
        describe: lists the candidates with their shapes, for the error message.

    Raises:
        DataError: the name asked for does not exist, or several tensors or none could be the embedding.
    """
    if asked is not None:
        if asked in names:
            return asked
        raise DataError(
            f"The checkpoint has no tensor {asked!r}.", rule=f"Its two-dimensional tensors are: {describe()}.",
            remedy="Set tensor to one of them.",
        )  # fmt: skip
    for wanted in architecture:  # tied names are one tensor: the first that is stored will do
        found = _ending_in(names, (wanted,))
        if len(found) == 1:
            return found[0]
    found = _ending_in(names, KNOWN_NAMES)
    if len(found) == 1:
        return found[0]
    what = (
        f"{len(found)} tensors could be the input embedding ({', '.join(found)})"
        if found
        else "No tensor has a known name"
    )
    raise DataError(
        f"The input embedding was not found: {what}.",
        rule=f"The checkpoint's two-dimensional tensors are: {describe()}.",
        remedy="Say which one it is with tensor=NAME.",
    )


def _ending_in(names: Collection[str], endings: Sequence[str]) -> list[str]:
    return sorted(
        name
        for name in names
        if any(name == ending or name.endswith("." + ending) for ending in endings)
    )


def read_index(path: Path) -> dict[str, str]:
    """Tensor name to file name, from a ``*.safetensors.index.json``.

    Raises:
        DataError: the index is malformed or names a file outside its folder.
    """
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        items = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(
            f"The index {path} is malformed: {error!r}.", remedy="Fetch it again."
        ) from None
    if outside := [file for file in items.values() if Path(file).name != file]:
        raise DataError(
            f"The index {path} names {outside[0]!r}, which is not a file beside it.",
            remedy="Fetch it again.",
        )
    return items


def small_files(files: Collection[str]) -> list[str]:
    """Of a repository's files, those that say which tensor is needed and what its rows are."""
    wanted = {
        "config.json",
        INDEX_FILE,
        "README.md",
        "added_tokens.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    return sorted((wanted | {"vocab.json", "vocab.txt"}) & set(files))


def weight_file(
    files: Collection[str],
    index: Mapping[str, str] | None,
    tensor: Callable[[Collection[str]], str],
) -> str:
    """The one file that has to be fetched from a repository.

    Args:
        files: the repository's files.
        index: tensor name to file of a sharded checkpoint; None when it has no index.
        tensor: chooses among tensor names (called only with an index).

    Raises:
        DataError: the weights are pickles, or several files without an index.
    """
    if index is not None:
        return index[tensor(index)]
    top = [name for name in files if "/" not in name]
    tensors = sorted(name for name in top if name.endswith(".safetensors"))
    if WEIGHT_FILE in tensors:
        return WEIGHT_FILE
    candidates = tensors or sorted(name for name in top if name.endswith(".gguf"))
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise no_weights(top, "The repository")
    raise DataError(
        f"The repository has {len(candidates)} weight files and no index: {', '.join(candidates)}.",
        remedy="Download the one you want and give its path.",
    )


def no_weights(files: Collection[str], where: str) -> DataError:
    """The error for a place without readable weights; pickles get their own remedy."""
    if pickles := sorted(name for name in files if name.endswith(PICKLE_ENDINGS)):
        return DataError(
            f"{where} has its weights only as pickles ({', '.join(pickles[:3])}).",
            rule="A pickle runs code when it is read, so it is never opened.",
            remedy="Convert it to safetensors (on a machine you trust with it: "
            "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)) and give the new folder.",
        )
    return DataError(
        f"{where} has no .safetensors and no .gguf file.",
        remedy="Give a checkpoint's folder or file.",
    )
