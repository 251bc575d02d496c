"""Small real checkpoints for the tests of token tables."""

from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import decoders as token_decoders

from mltfr_dist.config import TableConfig

RAW = TableConfig(normalise="none")
# Byte-level BPE: two control tokens, a blank, half a character ("Ã" is the byte 0xC3), words.
BYTE_LEVEL = ["<s>", "<|im_start|>", "Ġ", "Ã", "Ġthe", "ing", "ĠcafÃ©", "[unused3]"]
BYTE_LEVEL_KEPT = (" the", "ing", " café")


def table(num_rows: int = 8, dim: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed))


def write_tokenizer(folder: Path, tokens: list[str] = BYTE_LEVEL) -> None:
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    tokenizer.add_special_tokens([tokens[0]])
    tokenizer.save(str(folder / "tokenizer.json"))


def write_single(folder: Path, rows: torch.Tensor, name: str = "model.embed_tokens.weight") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: rows, "model.norm.weight": torch.ones(4), "lm_head.weight": table(8, 32, 5)},
        folder / "model.safetensors",
    )
    write_tokenizer(folder)
    return folder


def write_gguf(
    path: Path,
    rows: torch.Tensor,
    kind: gguf.GGMLQuantizationType,
    tokens: list[str],
    types: list[int],
) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_license("apache-2.0")
    writer.add_tensor("token_embd.weight", gguf.quantize(rows.numpy(), kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_split(folder: Path, blocks: list[str]) -> list[Path]:
    """A GGUF model in parts, each of which has the "tokens", the "tensor" or the "rest"."""
    paths = []
    for number, holds in enumerate(blocks):
        path = folder / f"m-{number + 1:05d}-of-{len(blocks):05d}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", len(blocks))
        if holds == "tokens":
            writer.add_tokenizer_model("gpt2")
            writer.add_token_list(BYTE_LEVEL)
            writer.add_license("mit")
        rows = table() if holds == "tensor" else table(2)
        name = "token_embd.weight" if holds == "tensor" else f"blk.{number}.weight"
        writer.add_tensor(name, rows.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths
