import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from table_files import BYTE_LEVEL_KEPT, RAW, table, write_single, write_tokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from mltfr_dist.config import TableConfig
from mltfr_dist.errors import DataError
from mltfr_dist.tables.extract import extract_table
from mltfr_dist.tables.store import table_hash

# --- safetensors


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]
)
def test_number_formats(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = table().to(dtype)
    extracted = extract_table(str(write_single(tmp_path, rows)), RAW)
    assert torch.equal(extracted.rows, rows.to(torch.float32)[4:7])
    assert extracted.vocabulary == BYTE_LEVEL_KEPT
    assert extracted.dropped == {"special": 2, "blank": 1, "fragment": 1, "unused": 1}


def test_integers_are_refused(tmp_path: Path) -> None:
    write_single(tmp_path, torch.zeros(8, 32, dtype=torch.int8))
    with pytest.raises(
        DataError, match=r"embed_tokens\.weight in .* is stored as I8.*unquantised checkpoint"
    ):
        extract_table(str(tmp_path), RAW)


def test_blocks_join_to_the_whole_tensor_and_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mltfr_dist.tables.checkpoints.source.BLOCK_BYTES", 3 * 32 * 4
    )  # three rows a block
    extracted = extract_table(str(write_single(tmp_path, table())), TableConfig(keep_special=True))
    assert torch.equal(extracted.rows, table())
    assert extracted.source_sha256 == table_hash(table())


def test_sharded_folder_reads_only_the_shard_it_needs(tmp_path: Path) -> None:
    write_single(tmp_path, table())
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    weight_map = {
        "model.embed_tokens.weight": "model-00001-of-00002.safetensors",
        "model.layers.0.weight": "model-00002-of-00002.safetensors",
    }
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    assert torch.equal(
        extract_table(str(tmp_path), RAW).rows, table()[4:7]
    )  # the other shard is not even there
    with pytest.raises(
        DataError,
        match=r"00002-of-00002\.safetensors is missing, which holds model\.layers\.0\.weight",
    ):
        extract_table(str(tmp_path), TableConfig(tensor="model.layers.0.weight"))


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"a": "b", "a": "c"}}',
        '{"weight_map": {"wte.weight": "../x.safetensors"}}',
    ],
)
def test_bad_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(DataError, match=r"is malformed|is not a file beside it"):
        extract_table(str(tmp_path), RAW)


def test_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        extract_table(str(tmp_path / "x.safetensors"), RAW)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    rows = table(8, 1 << 17)  # two rows a block
    rows[0] = value  # dropped, so that it does not matter
    extract_table(str(write_single(tmp_path, rows)), RAW)
    rows[5, 3] = value
    with pytest.raises(
        DataError,
        match=r"embed_tokens\.weight of model\.safetensors holds infinite values or NaN in one "
        r"row, row 5 \(token 'ing'\)",
    ):
        extract_table(str(write_single(tmp_path, rows)), RAW)
    rows[4:7, 1] = value
    with pytest.raises(DataError, match=r"in 3 rows, the first of them row 4 \(token ' the'\)"):
        extract_table(str(write_single(tmp_path, rows)), RAW)


# --- which tensor


def test_no_known_name_lists_the_candidates(tmp_path: Path) -> None:
    write_single(tmp_path, table(), name="words")
    with pytest.raises(
        DataError,
        match=r"No tensor has a known name.*words \[8, 32\], lm_head\.weight \[8, "
        r"32\]\..*--tensor NAME",
    ):
        extract_table(str(tmp_path), RAW)
    assert torch.equal(extract_table(str(tmp_path), TableConfig(tensor="words")).rows, table()[4:7])


def test_ambiguity_is_not_guessed_away(tmp_path: Path) -> None:
    save_file({"a.wte.weight": table(), "b.wte.weight": table(9)}, tmp_path / "x.safetensors")
    with pytest.raises(
        DataError,
        match=r"2 tensors could be.*\(a\.wte\.weight, b\.wte\.weight\).*b\.wte\.weight \[9, 32\]",
    ):
        extract_table(str(tmp_path / "x.safetensors"), RAW)


def test_tensor_asked_for_must_exist_and_be_a_matrix(tmp_path: Path) -> None:
    write_single(tmp_path, table())
    with pytest.raises(DataError, match=r"no tensor 'nope'.*model\.embed_tokens\.weight \[8, 32\]"):
        extract_table(str(tmp_path), TableConfig(tensor="nope"))
    with pytest.raises(
        DataError,
        match=r"model\.norm\.weight in .* has shape \[4\]; an embedding has two dimensions",
    ):
        extract_table(str(tmp_path), TableConfig(tensor="model.norm.weight"))


@pytest.mark.parametrize("tied", [True, False])
def test_llama_checkpoint(tmp_path: Path, tied: bool) -> None:
    sizes = {
        "vocab_size": 8,
        "hidden_size": 32,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    extracted = extract_table(str(tmp_path), RAW)
    assert extracted.source.tensor == "model.embed_tokens.weight"
    assert extracted.source.chosen_by == "config.json (LlamaModel)"
    assert torch.equal(extracted.rows, model.get_input_embeddings().weight.detach()[4:7])


def test_architecture_decides_where_names_alone_cannot(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=8, n_embd=32, n_layer=1, n_head=2, n_positions=16)
    )
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(weights | {"adapter.shared.weight": table(8, 32, 9)}, tmp_path / "model.safetensors")
    write_tokenizer(tmp_path)
    with pytest.raises(DataError, match="2 tensors could be the input embedding"):
        extract_table(str(tmp_path), RAW)
    model.config.save_pretrained(tmp_path)
    assert extract_table(str(tmp_path), RAW).source.tensor == "transformer.wte.weight"


def test_encoder_decoder_checkpoint(tmp_path: Path) -> None:
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=8, d_model=32, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    extracted = extract_table(str(tmp_path), RAW)
    assert torch.equal(extracted.rows, model.get_input_embeddings().weight.detach()[4:7])


def test_checkpoint_code_is_never_run(tmp_path: Path) -> None:
    write_single(tmp_path / "model", table())
    auto_map = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}
    (tmp_path / "model/config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": auto_map})
    )
    (tmp_path / "model/evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    extracted = extract_table(str(tmp_path / "model"), RAW)
    assert "its name" in extracted.source.chosen_by
    assert not (tmp_path / "ran").exists()


# --- places that hold nothing readable


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(
            DataError, match=r"only as pickles.*A pickle runs code.*Convert it to safetensors"
        ):
            extract_table(str(source), RAW)


def test_missing_and_unknown_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        extract_table(str(tmp_path / "none.gguf"), RAW)
    with pytest.raises(DataError, match=r"has no \.safetensors and no \.gguf file"):
        extract_table(str(tmp_path), RAW)
    (tmp_path / "x.txt").touch()
    with pytest.raises(DataError, match=r"x\.txt is no \.safetensors and no \.gguf file"):
        extract_table(str(tmp_path / "x.txt"), RAW)
