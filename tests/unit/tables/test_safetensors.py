"""Which safetensors tensor is the table, and what its rows truly are."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from table_files import BYTE_LEVEL, table, write_single, write_tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mltfr_dist.errors import DataError
from mltfr_dist.tables.checkpoints import EmbeddingSource, open_embedding

NAME = "model.embed_tokens.weight"
E4M3 = torch.float8_e4m3fn


def rows_of(source: EmbeddingSource) -> torch.Tensor:
    return torch.cat([rows for _, rows in source.blocks()])


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


# --- scales


def dequantised(stored: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """By hand, a number at a time."""
    rows = torch.empty(stored.shape)
    values, factors = stored.float(), scales.float()
    for row in range(len(rows)):
        for column in range(rows.shape[1]):
            rows[row, column] = values[row, column] * factors[row // block[0], column // block[1]]
    return rows


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_scale", "scale_weight", "scale"])
@pytest.mark.parametrize(
    ("shape", "block", "config"),
    [
        ((1, 1), (64, 32), None),
        ((64, 1), (1, 32), None),
        ((64, 4), (1, 8), None),
        ((4, 2), (16, 16), None),
        ((5, 3), (13, 11), {"quantization_config": {"weight_block_size": [13, 11]}}),
    ],
)
def test_fp8_with_scales(
    tmp_path: Path, suffix: str, shape: tuple, block: tuple, config: dict | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("mltfr_dist.tables.checkpoints.source.BLOCK_BYTES", 7 * 32 * 4)
    stored, scales = table(64, 32).to(E4M3), torch.rand(shape) + 0.01
    tensors = {
        NAME: stored,
        f"model.embed_tokens.{suffix}": scales,
        "model.embed_tokens.input_scale": torch.ones(1),
    }
    source = open_embedding(write(tmp_path, tensors, config))
    assert torch.equal(rows_of(source), dequantised(stored, scales, block))
    sizes = f"{block[0]} x {block[1]}"
    assert source.dtype.startswith(f"F8_E4M3 x {suffix} F32")
    assert sizes in source.dtype


@pytest.mark.parametrize("shape", [(), (1,), (64,)])
def test_fp8_with_few_scales(tmp_path: Path, shape: tuple[int, ...]) -> None:
    stored, scales = table(64, 32).to(torch.float8_e5m2), torch.rand(shape).bfloat16()
    tensors = {NAME: stored, "model.embed_tokens.weight_scale": scales}
    rows = rows_of(open_embedding(write(tmp_path, tensors)))
    assert torch.equal(rows, stored.float() * scales.float().reshape(-1, 1))


@pytest.mark.parametrize(
    ("size", "shape", "config", "message"),
    [
        ((600, 32), (5, 2), None, "in doubt"),  # 5 of 128 rows, or 5 of 120?
        ((64, 32), (3, 2), None, "in doubt"),
        ((64, 32), (2, 4, 1), None, "in doubt"),
        ((64, 32), (4, 2), {"quantization_config": {"weight_block_size": [32, 16]}}, "in doubt"),
    ],
)
def test_scales_in_doubt(
    tmp_path: Path, size: tuple, shape: tuple, config: dict | None, message: str
) -> None:
    tensors = {
        NAME: table(*size).to(E4M3),
        "model.embed_tokens.weight_scale_inv": torch.rand(shape),
    }
    with pytest.raises(DataError, match=message):
        open_embedding(write(tmp_path, tensors, config))


@pytest.mark.parametrize(
    "companions",
    [
        ["weight_scale", "weight_scale_2"],
        ["weight_scale", "weight_zero_point"],
        ["weight_scale", "weight_scale_inv"],
        ["SCB"],
        ["weight.absmax", "weight.quant_map"],
        ["qzeros", "scales"],
        ["bias"],
    ],
)
def test_unknown_companions_are_named(tmp_path: Path, companions: list[str]) -> None:
    more = {f"model.embed_tokens.{name}": torch.ones(64, 1) for name in companions}
    with pytest.raises(DataError, match="change what its values mean") as error:
        open_embedding(write(tmp_path, {NAME: table(64).to(E4M3)} | more))
    assert all(name in error.value.what for name in companions)


@pytest.mark.parametrize(
    "blocks", [["qweight", "qzeros", "scales"], ["weight_packed"], ["_weight_qdata"]]
)
def test_quantised_in_parts(tmp_path: Path, blocks: list[str]) -> None:
    more = {f"model.embed_tokens.{name}": torch.ones(8, 4, dtype=torch.int32) for name in blocks}
    with pytest.raises(DataError, match=rf"in parts \(model\.embed_tokens\.{blocks[0]}.*quantised"):
        open_embedding(write(tmp_path, more | {"model.norm.weight": torch.ones(4)}))


def test_fp8_whose_scales_are_missing(tmp_path: Path) -> None:
    stored = {NAME: table().to(E4M3)}
    quantised = {"quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(DataError, match=r"scales are missing: config\.json says.*\(fp8\)"):
        open_embedding(write(tmp_path / "a", stored, quantised))
    other = {"model.layers.0.mlp.weight_scale": torch.ones(1)}
    with pytest.raises(DataError, match=r"scales are missing: other tensors.*layers\.0\.mlp"):
        open_embedding(write(tmp_path / "b", stored | other))
    spared = {"quant_method": "fp8", "modules_to_not_convert": ["embed_tokens"]}
    source = open_embedding(write(tmp_path / "c", stored, {"quantization_config": spared}))
    assert torch.equal(rows_of(source), stored[NAME].float())


def test_scales_of_a_tensor_that_is_no_fp8(tmp_path: Path) -> None:
    tensors = {NAME: table().bfloat16(), "model.embed_tokens.weight_scale": torch.ones(8, 1)}
    with pytest.raises(DataError, match="stored as BF16 with scales"):
        open_embedding(write(tmp_path, tensors))


def test_scales_in_another_part_of_the_model(tmp_path: Path) -> None:
    """Given one file of the model, its scales are still found: by the index or by the name."""
    stored, scales = table().to(E4M3), torch.rand(8, 1)
    one, two = (tmp_path / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    save_file({NAME: stored}, one)
    save_file({"model.embed_tokens.weight_scale_inv": scales}, two)
    assert torch.equal(rows_of(open_embedding(one)), stored.float() * scales)
    weight_map = {NAME: one.name, "model.embed_tokens.weight_scale_inv": two.name}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for path in (one, tmp_path):
        source = open_embedding(path)
        assert torch.equal(rows_of(source), stored.float() * scales)
        assert source.files == (one.name, two.name)
    two.unlink()
    with pytest.raises(DataError, match=r"00002\.safetensors is missing, which holds .*scale_inv"):
        open_embedding(one)


# --- several copies


def test_a_stale_index(tmp_path: Path) -> None:
    write(tmp_path, {NAME: table()})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {NAME: "model-00001-of-00001.safetensors"}}))
    source = open_embedding(tmp_path)
    assert torch.equal(rows_of(source), table())
    assert "not read: model.safetensors.index.json" in source.chosen_by
    shard = tmp_path / "model-00001-of-00001.safetensors"
    save_file({NAME: table(seed=9)}, shard)
    with pytest.raises(
        DataError,
        match=rf"{NAME} in model\.safetensors, {NAME} in model-00001.*differ.*path of the",
    ):
        open_embedding(tmp_path)
    assert torch.equal(rows_of(open_embedding(shard)), table(seed=9))  # the remedy
    save_file({NAME: table()}, shard)
    assert torch.equal(rows_of(open_embedding(tmp_path)), table())


def test_two_files_with_one_name(tmp_path: Path) -> None:
    save_file({NAME: table()}, tmp_path / "a.safetensors")
    save_file({NAME: table().half()}, tmp_path / "b.fp16.safetensors")
    with pytest.raises(DataError, match=r"in a\.safetensors, .* in b\.fp16\.safetensors.*differ"):
        open_embedding(tmp_path)
    save_file({NAME: table()}, tmp_path / "b.fp16.safetensors")
    assert torch.equal(rows_of(open_embedding(tmp_path)), table())


def test_other_weights_beside_the_usual_ones_are_named(tmp_path: Path) -> None:
    write(tmp_path, {NAME: table()})
    save_file({NAME: table().half()}, tmp_path / "model.fp16.safetensors")
    save_file({"tok_embeddings.weight": table(9)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "q4.gguf").write_bytes(b"GGUF")
    for name in ("pytorch_model.bin", "model.onnx"):
        (tmp_path / name).touch()
    source = open_embedding(tmp_path)
    assert torch.equal(rows_of(source), table())
    assert "not read: consolidated.safetensors, model.fp16.safetensors, q4.gguf" in source.chosen_by


def test_several_models(tmp_path: Path) -> None:
    save_file({NAME: table()}, tmp_path / "a.safetensors")
    (tmp_path / "q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(DataError, match=r"2 models: a\.safetensors, q4\.gguf\. Give the path of"):
        open_embedding(tmp_path)
    (tmp_path / "b").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"b/{name}.safetensors.index.json").touch()
    with pytest.raises(DataError, match=r"2 indexes of models: a\.safetensors\.index\.json, b\."):
        open_embedding(tmp_path / "b")


@pytest.mark.parametrize("equal", [True, False])
def test_t5_with_copies(tmp_path: Path, equal: bool) -> None:
    tensors = {
        "shared.weight": table(),
        "encoder.embed_tokens.weight": table(seed=0 if equal else 1),
    }
    sizes = {"vocab_size": 8, "d_model": 32, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    for config in (None, {"model_type": "t5", **sizes}):
        write(tmp_path, tensors, config)
        if equal:
            assert torch.equal(rows_of(open_embedding(tmp_path)), table())
        else:
            with pytest.raises(
                DataError, match=r"encoder\.embed_tokens\.weight.*they differ.*NAME"
            ):
                open_embedding(tmp_path)


# --- which tensor


@pytest.mark.parametrize(
    ("name", "others"),
    [
        (
            "text_model.embeddings.token_embedding.weight",
            ["text_model.embeddings.position_embedding.weight", "vision_model.embedding.weight"],
        ),
        ("language_model.model.embed_tokens.weight", ["visual.pos_embed.weight"]),
        ("model.language_model.embed_tokens.weight", ["model.vision.embedding.weight"]),
        ("bert.word_embeddings.weight", ["bert.position.embeddings.weight"]),
        ("rwkv.embeddings.weight", []),
        ("transformer.word_embedding.weight", ["lm_loss.weight"]),
    ],
)
def test_names(tmp_path: Path, name: str, others: list[str]) -> None:
    tensors = {name: table()} | {other: table(9) for other in others}
    assert open_embedding(write(tmp_path, tensors)).tensor == name


def test_only_a_position_embedding(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No tensor has a known name"):
        open_embedding(write(tmp_path, {"position.embedding.weight": table()}))


@pytest.mark.parametrize(
    ("config", "is_tied"),
    [
        (None, False),
        ({"model_type": "unknown", "tie_word_embeddings": False}, False),
        ({"model_type": "unknown", "tie_word_embeddings": True}, True),
        ({"model_type": "gemma", "vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 1}, True),
        (
            {"model_type": "llama", "vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 1},
            False,
        ),
    ],
)
def test_a_tied_output_layer(tmp_path: Path, config: dict | None, is_tied: bool) -> None:
    write(tmp_path, {"lm_head.weight": table(), "model.norm.weight": torch.ones(4)}, config)
    if is_tied:
        source = open_embedding(tmp_path)
        assert torch.equal(rows_of(source), table())
        assert "tied" in source.chosen_by
    else:
        with pytest.raises(DataError, match=r"lm_head\.weight is an output layer.*--tensor NAME"):
            open_embedding(tmp_path)
        assert torch.equal(rows_of(open_embedding(tmp_path, "lm_head.weight")), table())


# --- adapters


def test_adapters(tmp_path: Path) -> None:
    lora = {
        "base_model.model.model.embed_tokens.lora_embedding_A": torch.rand(2, 8),
        "base_model.model.model.embed_tokens.lora_embedding_B": torch.rand(32, 2),
    }
    base = {"base_model.model.model.embed_tokens.base_layer.weight": table()}
    refused = r"adapter that changes the input embedding.*lora_embedding_A.*merge_and_unload"
    for name, tensors in {
        "model": lora | base,
        "model-peft": lora | {"base_model.model.model.embed_tokens.weight": table()},
    }.items():
        write(tmp_path / name, tensors)
        with pytest.raises(DataError, match=refused):
            open_embedding(tmp_path / name)
    beside = write(tmp_path / "beside", {NAME: table()})
    save_file(lora, beside / "adapter_model.safetensors")
    with pytest.raises(DataError, match=refused):
        open_embedding(beside)
    assert torch.equal(rows_of(open_embedding(beside / "model.safetensors")), table())
    other = {"base_model.model.model.layers.0.q_proj.lora_A.weight": torch.rand(2, 8)}
    save_file(other, beside / "adapter_model.safetensors")  # the embedding stays the base model's
    assert torch.equal(rows_of(open_embedding(beside)), table())
    (beside / "model.safetensors").unlink()
    settings = {"base_model_name_or_path": "owner/base", "target_modules": ["q_proj"]}
    (beside / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        DataError, match=r"without an embedding of its own.*Give the base model: owner"
    ):
        open_embedding(beside)
    saved = {"base_model.model.model.embed_tokens.weight": table(seed=4)}  # modules_to_save
    save_file(other | saved, beside / "adapter_model.safetensors")
    assert torch.equal(rows_of(open_embedding(beside)), table(seed=4))
    save_file({NAME: table()}, beside / "model.safetensors")
    with pytest.raises(DataError, match=r"changes the input embedding"):
        open_embedding(beside)


def test_the_remedy_for_adapters_is_a_command(tmp_path: Path) -> None:
    """It was typed with peft 0.21, which is no dependency of this project."""
    embedding = "base_model.model.model.embed_tokens"
    lora = {f"{embedding}.lora_embedding_A": torch.rand(2, 8)}
    save_file(lora, tmp_path / "adapter_model.safetensors")
    settings = {"base_model_name_or_path": "owner/base", "target_modules": ["embed_tokens"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError) as error:
        open_embedding(tmp_path)
    program = shlex.split(error.value.remedy.split("`")[3])
    assert program[:2] == ["python", "-c"]
    compile(program[2], "remedy", "exec")
    assert f'from_pretrained("{tmp_path}").merge_and_unload()' in program[2]
    assert 'AutoTokenizer.from_pretrained("owner/base").save_pretrained' in program[2]


# --- model2vec and sentence-transformers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_model2vec(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = (table(6, 16) * 20).to(dtype)
    mapping, weights = torch.tensor([3, 0, 5, 5, 1]), torch.rand(5, dtype=torch.float64)
    as_it_does = stored.numpy()[mapping.numpy()] * weights.numpy()[:, None]
    config = {"model_type": "model2vec", "architectures": ["StaticModel"]}
    source = open_embedding(write(tmp_path / "a", {"embeddings": stored}, config))
    assert torch.equal(rows_of(source), stored.float())
    more = {"mapping": mapping, "weights": weights}
    source = open_embedding(write(tmp_path / "b", {"embeddings": stored, **more}, config))
    assert source.num_rows == 5
    assert np.array_equal(rows_of(source).numpy(), as_it_does.astype(np.float32))
    more["mapping"] = mapping.to(torch.int32)
    source = open_embedding(
        write(tmp_path / "b", {"embeddings": stored, "mapping": more["mapping"]})
    )
    assert torch.equal(rows_of(source), stored.float()[mapping])


@pytest.mark.parametrize(
    "more",
    [
        {"mapping": torch.tensor([0, 6])},
        {"mapping": torch.tensor([0, -1])},
        {"mapping": torch.tensor([[0]])},
        {"mapping": torch.tensor([0.0, 1.0])},
        {"weights": torch.ones(5)},
        {"mapping": torch.tensor([0, 1]), "weights": torch.ones(6)},
    ],
)
def test_model2vec_that_does_not_fit(tmp_path: Path, more: dict[str, torch.Tensor]) -> None:
    with pytest.raises(DataError, match="not as model2vec writes it"):
        open_embedding(write(tmp_path, {"embeddings": table(6), **more}))


@pytest.mark.parametrize("kind", ["Transformer", "StaticEmbedding"])
def test_sentence_transformers(tmp_path: Path, kind: str) -> None:
    name = "embedding.weight" if kind == "StaticEmbedding" else "embeddings.word_embeddings.weight"
    write(tmp_path / f"0_{kind}", {name: table()})
    write(tmp_path / "2_Dense", {"linear.weight": table(9)})
    write_tokenizer(tmp_path / f"0_{kind}")
    modules = [{"idx": 0, "path": f"0_{kind}"}, {"idx": 1, "path": "2_Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    source = open_embedding(tmp_path)
    assert torch.equal(rows_of(source), table())
    assert source.read_vocabulary().tokens[4] == " the"
    for content in ("[]", "{}", '[{"path": "../x"}]', "["):
        (tmp_path / "modules.json").write_text(content)
        with pytest.raises(DataError, match=r"modules\.json"):
            open_embedding(tmp_path)


def test_diffusers(tmp_path: Path) -> None:
    name = "text_model.embeddings.token_embedding.weight"
    for suffix in ("", "_2"):
        write(tmp_path / f"text_encoder{suffix}", {name: table()})
        (tmp_path / f"tokenizer{suffix}").mkdir()
        write_tokenizer(tmp_path / f"tokenizer{suffix}", [*BYTE_LEVEL[:7], f"last{suffix}"])
    with pytest.raises(DataError, match=r"in its folders text_encoder, text_encoder_2\. Give the"):
        open_embedding(tmp_path)
    vocabulary = open_embedding(tmp_path / "text_encoder_2").read_vocabulary()
    assert vocabulary.tokens[7] == "last_2"


# --- pickles


def test_the_remedy_for_pickles_works_when_typed(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 8,
        "hidden_size": 32,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    folder = tmp_path / "my model's"
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.config.save_pretrained(folder)
    write_tokenizer(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(DataError) as error:
        open_embedding(folder)
    command = error.value.remedy.partition("`")[2].rpartition("`")[0]
    program = shlex.split(command)
    assert program[0] == "python"
    subprocess.run([sys.executable, *program[1:]], cwd=tmp_path, check=True, capture_output=True)
    source = open_embedding(tmp_path / "my model's-safetensors")
    assert torch.equal(rows_of(source), model.get_input_embeddings().weight.detach())
    assert source.read_vocabulary().tokens[4] == " the"


def test_the_remedy_for_other_pickles_works_when_typed(tmp_path: Path) -> None:
    torch.save({"tok_embeddings.weight": table()}, tmp_path / "consolidated.00.pth")
    write_tokenizer(tmp_path)
    with pytest.raises(DataError) as error:
        open_embedding(tmp_path / "consolidated.00.pth")
    program = shlex.split(error.value.remedy.partition("`")[2].rpartition("`")[0])
    subprocess.run([sys.executable, *program[1:]], cwd=tmp_path, check=True, capture_output=True)
    assert torch.equal(rows_of(open_embedding(tmp_path)), table())


def test_places_without_weights(tmp_path: Path) -> None:
    (tmp_path / "tf_model.h5").touch()
    with pytest.raises(DataError, match=r"no \.gguf file, and tf_model\.h5 cannot be read"):
        open_embedding(tmp_path)
    write_single(tmp_path / "sub", table())
    with pytest.raises(DataError, match=r"in its folders sub\. Give the path of one") as error:
        open_embedding(tmp_path)
    path = error.value.remedy.removesuffix(".").rpartition(" ")[2]
    assert torch.equal(rows_of(open_embedding(Path(path))), table())


def test_a_header_that_describes_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    entry = '"model.embed_tokens.weight":{{"dtype":"F32","shape":[{},{}],"data_offsets":[0,256]}}'
    header = ("{" + entry.format(8, 8) + "," + entry.format(4, 16) + "}").encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(256))
    with pytest.raises(DataError, match=r"embed_tokens\.weight' stands twice"):
        open_embedding(path)
