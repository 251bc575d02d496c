"""Which files of a folder, or of a repository on the hub, are the model: decided by names alone."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mltfr_dist.errors import DataError
from mltfr_dist.tables.checkpoints.formats import FORMATS
from mltfr_dist.tables.checkpoints.source import read_json
from mltfr_dist.tables.choose import ADAPTER_CONFIG

INDEX_FILE = "model.safetensors.index.json"
WEIGHT_FILE = "model.safetensors"
MODULES_FILE = "modules.json"
PICKLE_ENDINGS = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
_OTHER_ENDINGS = (".h5", ".onnx", ".msgpack", ".ot", ".npz", ".mlmodel", ".tflite")
_READABLE = tuple(ending for ending, entry in FORMATS.items() if entry.in_folders)
_FURTHER = tuple(ending for ending in _READABLE if ending not in (".safetensors", ".gguf"))
_NO_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
"""Names of the files of a model that is stored in parts."""

MOST_PARTS = 10_000
"""More parts are no model; their names are not gone through."""

_SMALL_FILES = frozenset({
    "config.json",
    INDEX_FILE,
    ADAPTER_CONFIG,
    "README.md",
    "added_tokens.json",
    "dict.txt",
    "merges.txt",
    "rwkv_vocab_v20230424.txt",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "special_tokens_map.json",
    "spiece.model",
    "spm.model",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
})  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """The weights of one model in a folder.

    Attributes:
        files: names of its weight files, of one format; empty where the index alone names them.
        index: name of the file that says which weight file holds which tensor.
        adapter: name of a fine-tuning adapter's file, or of its configuration.
        ignored: weight files in the folder that are not read.
    """

    files: tuple[str, ...]
    index: str | None = None
    adapter: str | None = None
    ignored: tuple[str, ...] = ()

    @property
    def ending(self) -> str:
        """Ending of the weight files, which says their format."""
        return PurePosixPath(self.files[0]).suffix.lower() if self.files else ".safetensors"


def find_layout(names: Collection[str], where: str, choice: str = "") -> Layout:
    """The one model among the files of a folder.

    Args:
        names: paths of the files, relative to the folder, with forward slashes.
        where: how to call the folder in messages.
        choice: how to choose among the files of a repository; empty for a folder.

    Raises:
        DataError: nothing readable is there, or more than one model.
    """
    top = sorted(name for name in names if "/" not in name)
    adapters = [name for name in top if name.startswith("adapter_model")]
    adapter = min(adapters, default=ADAPTER_CONFIG if ADAPTER_CONFIG in top else None)
    tensors = [name for name in top if name.endswith(".safetensors") and name != adapter]
    ggufs = [name for name in top if name.endswith(".gguf")]
    indexes = [name for name in top if name.endswith(".safetensors.index.json")]
    if WEIGHT_FILE in tensors:
        index = INDEX_FILE if INDEX_FILE in indexes else None
        others = tuple(name for name in (*tensors, *ggufs) if name != WEIGHT_FILE)
        return Layout((WEIGHT_FILE,), index, adapter, others)
    if indexes:
        if len(indexes) > 1 and INDEX_FILE not in indexes:
            raise _several("indexes of models", indexes, where, choice)
        index = INDEX_FILE if INDEX_FILE in indexes else indexes[0]
        return Layout((), index, adapter, (*tensors, *ggufs))
    if tensors and ggufs:
        raise _several("models", [*tensors, *ggufs], where, choice)
    if tensors:
        return Layout(tuple(tensors), None, adapter)
    if ggufs:
        models = [name for name in ggufs if not _NO_MODEL.search(name)] or ggufs
        if len({_stem(name) for name in models}) > 1:
            raise _several("GGUF files", models, where, choice)
        return Layout(tuple(models), None, adapter, tuple(n for n in ggufs if n not in models))
    if adapter and adapter.endswith(".safetensors"):
        return Layout((adapter,), None, adapter)
    further = [name for name in top if name.endswith(_FURTHER)]
    if len(further) > 1:
        raise _several(
            f"files of {FORMATS[PurePosixPath(further[0]).suffix].what}", further, where, choice
        )
    if further:
        return Layout((further[0],))
    raise no_weights(names, where, choice)


def _several(what: str, names: Collection[str], where: str, choice: str) -> DataError:
    shown = ", ".join(sorted(names)[:12])
    return DataError(
        f"{where} holds {len(names)} {what}: {shown}.",
        remedy=choice or f"Give the path of one of them, such as {where}/{min(names)}.",
    )


def _stem(name: str) -> str:
    match = PART.fullmatch(name)
    return f"{match[1]} of {match[3]}" if match else name


def local_names(folder: Path) -> list[str]:
    """The files in ``folder`` and in its direct subfolders, as :func:`find_layout` wants them."""
    paths = [*folder.glob("*"), *folder.glob("*/*")]
    return [path.relative_to(folder).as_posix() for path in paths if path.is_file()]


def model_folder(names: Collection[str], read: Callable[[str], Path]) -> str:
    """Where the tokens' model lies: "" or a subfolder, by sentence-transformers' ``modules.json``.

    Args:
        names: as for :func:`find_layout`.
        read: gives the path on this machine of one of ``names``.

    Raises:
        DataError: ``modules.json`` is malformed.
    """
    if MODULES_FILE not in names:
        return ""
    file = read(MODULES_FILE)
    modules = read_json(file)
    try:
        folder = PurePosixPath(str(modules[0]["path"])).as_posix().strip("/")
    except (KeyError, IndexError, TypeError) as error:
        raise DataError(f"{file} is malformed: {error!r}.", remedy="Fetch it again.") from None
    if folder in ("", "."):
        return ""
    if not any(name.startswith(folder + "/") for name in names):
        raise DataError(
            f"{file} names the folder {folder!r}, which is not beside it.",
            remedy="Fetch the checkpoint again.",
        )
    return folder


def read_index(path: Path) -> dict[str, str]:
    """Tensor name to file name, from a ``*.safetensors.index.json``.

    Raises:
        DataError: the index is malformed or names a file outside its folder.
    """
    content = read_json(path, unique=True)
    try:
        items = {str(name): str(file) for name, file in content["weight_map"].items()}
    except (KeyError, AttributeError, TypeError) as error:
        raise DataError(
            f"The index {path} is malformed: {error!r}.", remedy="Fetch it again."
        ) from None
    if outside := [file for file in items.values() if Path(file).name != file or "\0" in file]:
        raise DataError(
            f"The index {path} names {outside[0]!r}, which is not a file beside it.",
            remedy="Fetch it again.",
        )
    return items


def small_files(names: Collection[str], folder: str = "") -> list[str]:
    """Of a repository's files, those that say which tensor is needed and what its rows are."""
    prefix = f"{folder}/" if folder else ""
    return sorted(
        name
        for name in names
        if name.startswith(prefix)
        and "/" not in (rest := name.removeprefix(prefix))
        and (rest in _SMALL_FILES or rest.endswith((".safetensors.index.json", ".tiktoken")))
    )


def no_weights(names: Collection[str], where: str, choice: str = "") -> DataError:
    """The error for a place without readable weights; pickles get their own remedy.

    Args:
        names: as for :func:`find_layout`.
        where: the folder, as a person can type it, or a repository's id.
        choice: as for :func:`find_layout`.
    """
    top = sorted(name for name in names if "/" not in name)
    if pickles := [name for name in top if name.endswith(PICKLE_ENDINGS)]:
        return DataError(
            f"{where} has its weights only as pickles ({', '.join(pickles[:3])}).",
            rule="A pickle runs code when it is read, so it is never opened.",
            remedy=f"Convert it to safetensors: {_conversion(where, pickles, choice)}",
        )
    below = {name.rpartition("/")[0] for name in names if "/" in name and name.endswith(_READABLE)}
    if below:
        return DataError(
            f"{where} has no weights of its own, but there are some in its folders "
            f"{', '.join(sorted(below)[:8])}.",
            remedy=choice or f"Give the path of one of them, such as {where}/{min(below)}.",
        )
    others = [name for name in top if name.endswith(_OTHER_ENDINGS)]
    return DataError(
        f"{where} has no .safetensors and no .gguf file"
        + (f", and {', '.join(others[:3])} cannot be read." if others else "."),
        rule="Readable are .safetensors, .gguf, and word vectors as text (.vec, .txt).",
        remedy="Give the folder or file of a checkpoint in one of these formats.",
    )


def _conversion(where: str, pickles: Collection[str], choice: str) -> str:
    """A command that makes safetensors of pickles, beside their tokenizer or with it."""
    if any(name.startswith("pytorch_model") for name in pickles):
        source, target = json.dumps(where), json.dumps(f"{Path(where).absolute().name}-safetensors")
        code = (
            "from transformers import AutoModel, AutoTokenizer; "
            f"AutoModel.from_pretrained({source}).save_pretrained({target}); "
            f"AutoTokenizer.from_pretrained({source}).save_pretrained({target})"
        )
        return f"run `python -c {shlex.quote(code)}` and give the folder {json.loads(target)}."
    if choice:
        return choice
    source = json.dumps(f"{where}/{min(pickles)}")
    target = json.dumps(f"{where}/{PurePosixPath(min(pickles)).stem}.safetensors")
    code = (
        "import torch; from safetensors.torch import save_file; "
        f'held = torch.load({source}, map_location="cpu", weights_only=True); '
        f"save_file({{name: held[name].clone() for name in held}}, {target})"
    )
    return f"run `python -c {shlex.quote(code)}` and give {where} again."
