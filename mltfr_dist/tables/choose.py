"""Which tensor of a checkpoint is the input embedding: decided by names alone."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mltfr_dist.errors import DataError

KNOWN_NAMES = (
    "embed_tokens.weight",
    "tok_embeddings.weight",
    "word_embeddings.weight",
    "word_embedding.weight",
    "wte.weight",
    "embed_in.weight",
    "tokens_embed.weight",
    "token_embedding.weight",
    "token_embd.weight",
    "shared.weight",
    "embedding.weight",
    "embeddings.weight",
    "emb.weight",
)
"""Last parts of tensor names that language models give their input embedding."""

STATIC_NAME = "embeddings"
"""The whole name of model2vec's table."""

ADAPTER_CONFIG = "adapter_config.json"
"""What PEFT writes beside an adapter's weights."""

OUTPUT_NAMES = ("lm_head.weight", "embed_out.weight", "output.weight")
"""Last parts of names of output layers, which hold the embedding where a model ties the two."""

_NOT_TOKENS = {
    *("pos", "position", "positions", "positional", "wpe", "relative"),
    *("type", "segment", "segments", "patch", "patches", "vision", "visual"),
}
"""Words in the names of embeddings of something else than tokens."""

_ADAPTER = re.compile(
    r"\b(lora|loha|lokr|ia3|vera|dora|base_layer|original_module|modules_to_save|trainable_tokens"
    r"|token_adapter)(?![a-z])"
)
_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Architecture:
    """What ``config.json`` says about the input embedding.

    Attributes:
        names: names that ``transformers`` gives it (several when the architecture ties the tensor);
            prefixes such as ``model.`` may differ from the checkpoint's.
        note: the model class, or why there are no names.
        tied: whether the output layer is the same tensor.
    """

    names: tuple[str, ...] = ()
    note: str = "no config.json"
    tied: bool = False


def names_from_config(folder: Path, settings: Mapping[str, Any]) -> Architecture:
    """Ask ``transformers`` for the input embedding of the architecture in ``folder/config.json``.

    The model is built on the meta device, so no weight is allocated, and never from code in the
    checkpoint.

    Args:
        folder: the checkpoint's folder.
        settings: the content of its ``config.json``; empty when there is none.
    """
    if not settings:
        return Architecture()
    text = settings.get("text_config")
    said = {
        section.get("tie_word_embeddings", section.get("tie_embeddings"))
        for section in (settings, text if isinstance(text, dict) else {})
    }
    tied = said - {None} == {True}
    layers = [value for name, value in settings.items() if "layer" in name]
    if any(isinstance(value, int) and value > _MOST_LAYERS for value in layers):
        return Architecture(note=f"config.json claims more than {_MOST_LAYERS} layers", tied=tied)
    # Imported here: transformers takes seconds to load, and most sources do not need it.
    import torch
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if said == {None}:
            tied = getattr(config.get_text_config(), "tie_word_embeddings", False) is True
        with torch.device("meta"):
            model = AutoModel.from_config(config, trust_remote_code=False)
        weight = model.get_input_embeddings().weight
    except Exception as error:  # transformers raises what it likes, NotImplementedError included
        return Architecture(
            note=f"transformers cannot build it ({type(error).__name__})", tied=tied
        )
    parameters = model.named_parameters(remove_duplicate=False)
    names = [name for name, parameter in parameters if parameter is weight]
    return Architecture(tuple(names) if weight.dim() == 2 else (), type(model).__name__, tied)


def choose_tensors(
    names: Collection[str],
    *,
    asked: str | None,
    architecture: Architecture,
    where: str,
    describe: Callable[[], str],
) -> tuple[list[str], str]:
    """The input embedding's name: several names where the caller has to see that all are equal.

    Args:
        names: every tensor of the checkpoint.
        asked: the name that the user gave; it must exist.
        architecture: what ``config.json`` says.
        where: the checkpoint's folder, for the error message.
        describe: lists the candidates with their shapes, for the error message.

    Returns:
        The names, and how they were found, for the log.

    Raises:
        DataError: the name asked for does not exist, or no tensor is known to be the embedding.
    """
    if asked is not None:
        if asked in names:
            return [asked], "asked for"
        raise DataError(
            f"The checkpoint has no tensor {asked!r}.",
            rule=f"Its two-dimensional tensors are: {describe()}.",
            remedy="Give one of them with --tensor NAME.",
        )
    note = architecture.note
    by_config = [_ending_in(names, wanted) for wanted in architecture.names]
    if chosen := [one[0] for one in by_config if len(one) == 1]:
        return chosen, f"config.json ({note})"
    usual = [
        name
        for name in sorted({name for known in KNOWN_NAMES for name in _ending_in(names, known)})
        if _NOT_TOKENS.isdisjoint(re.split(r"[._]", name)) and not _ADAPTER.search(name)
    ]
    if chosen := usual or [name for name in names if name == STATIC_NAME]:
        return chosen, f"its name ({note})"
    _refuse_changed(names, where)
    output = [name for wanted in OUTPUT_NAMES for name in _ending_in(names, wanted)]
    if output and architecture.tied:
        return output, "config.json (the output layer, which is tied to the input)"
    untied = (
        f" {output[0]} is an output layer, and config.json does not say that it is the input too."
        if output
        else ""
    )
    raise DataError(
        f"The input embedding was not found: No tensor has a known name.{untied}",
        rule=f"The checkpoint's two-dimensional tensors are: {describe()}.",
        remedy="Say which one it is with --tensor NAME.",
    )


def siblings(name: str, names: Collection[str]) -> list[str]:
    """Tensors beside ``name`` in its module, or named after it, which may change what it means."""
    module = name.rpartition(".")[0]
    result = []
    for other in names:
        rest = other.removeprefix(module + ".") if module and other.startswith(module + ".") else ""
        beside = rest and ("." not in rest or is_adapter(rest))
        named_after = other.startswith(name + ".") or other in (
            name + "_scale",
            name + "_scale_inv",
        )
        if other != name and (beside or named_after):
            result.append(other)
    return sorted(result)


def is_adapter(name: str) -> bool:
    """Whether a tensor's name is that of a part of a fine-tuning adapter (PEFT)."""
    return _ADAPTER.search(name) is not None


def _refuse_changed(names: Collection[str], where: str) -> None:
    """Raise DataError if the embedding's module is there, but not as a plain weight."""
    modules = {known.removesuffix(".weight") for known in KNOWN_NAMES}
    changed = sorted(
        name
        for name in names
        if any(f".{module}." in f".{name}" for module in modules)
        and _NOT_TOKENS.isdisjoint(re.split(r"[._]", name))
    )
    if not changed:
        return
    if any(is_adapter(name) for name in changed):
        raise unmerged(changed, where)
    raise DataError(
        f"The input embedding is stored in parts ({', '.join(changed[:4])}): it is quantised.",
        rule="Quantised embeddings are read from GGUF files, and as FP8 with its scales.",
        remedy="Use an unquantised checkpoint or a GGUF file.",
    )


def unmerged(tensors: Collection[str], where: str, base: str = "BASE") -> DataError:
    """The error for an embedding that an adapter changes when the model is loaded.

    Args:
        tensors: what shows it.
        where: the folder.
        base: path or id of the base model.
    """
    source, target = json.dumps(where), json.dumps(f"{Path(where).absolute().name}-merged")
    code = (
        "from peft import AutoPeftModelForCausalLM; from transformers import AutoTokenizer; "
        f"AutoPeftModelForCausalLM.from_pretrained({source}).merge_and_unload()"
        f".save_pretrained({target}); "
        f"AutoTokenizer.from_pretrained({json.dumps(base)}).save_pretrained({target})"
    )
    remedy = (
        f"Merge it: with `pip install peft`, run `python -c {shlex.quote(code)}` and give "
        f"the folder {json.loads(target)}."
        if (Path(where) / ADAPTER_CONFIG).is_file()
        else "Load the model as it was trained, merge it (merge_and_unload() of peft), save it "
        "and its tokenizer with save_pretrained, and give the new folder."
    )
    return DataError(
        f"{where} holds an adapter that changes the input embedding and is not merged "
        f"({', '.join(sorted(tensors)[:3])}).",
        rule="The rows of the base model are not those that the model works with.",
        remedy=remedy,
    )


def _ending_in(names: Collection[str], ending: str) -> list[str]:
    return sorted(name for name in names if name == ending or name.endswith("." + ending))
