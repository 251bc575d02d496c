"""The hub's route: what is fetched is decided by pure functions over a repository's listing."""

import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import save_file
from table_files import BYTE_LEVEL, table, write_gguf, write_single, write_split, write_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from mltfr_dist.errors import DataError
from mltfr_dist.tables import hub
from mltfr_dist.tables.checkpoints import open_embedding


class Repository:
    """A folder that stands for a repository: files are listed at once and fetched one by one."""

    def __init__(self, folder: Path, cache: Path, more: Collection[str] = ()) -> None:
        self.folder, self.cache, self.fetched = folder, cache, set[str]()
        result = [path for path in folder.rglob("*") if path.is_file()]
        self.files = [path.relative_to(folder).as_posix() for path in result] + [*more]

    def get(self, name: str) -> Path:
        target = self.cache / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((self.folder / name).read_bytes())
        self.fetched.add(name)
        return target

    def fetch(self, tensor: str | None = None) -> Path:
        return hub.fetch_files(self.files, "owner/name", tensor, self.get)


def test_ids() -> None:
    assert hub.parse_hub_id("Qwen/Qwen3-0.6B") == ("Qwen/Qwen3-0.6B", None)
    assert hub.parse_hub_id("Qwen/Qwen3-0.6B@refs/pr/1") == ("Qwen/Qwen3-0.6B", "refs/pr/1")
    for path in ("folder", "./a/b", "/a/b", "a/b/c", "models/x.gguf", "../a", "glove/x.txt"):
        assert hub.parse_hub_id(path) is None


def test_the_one_shard_with_the_embedding(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.save_pretrained(tmp_path / "at", max_shard_size="150KB")
    write_tokenizer(tmp_path / "at")
    more = ["README.md", "onnx/model.safetensors", "original/x.pth"]
    repository = Repository(tmp_path / "at", tmp_path / "here")
    repository.files += more[1:]
    assert repository.fetch() == tmp_path / "here"
    shards = {name for name in repository.fetched if name.endswith(".safetensors")}
    assert len(shards) == 1
    assert repository.fetched - shards == {
        "config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
    }
    _, rows = open_embedding(tmp_path / "here").read_rows(0, 512)
    assert torch.equal(rows, model.get_input_embeddings().weight.detach())


def test_scales_in_another_shard_come_too(tmp_path: Path) -> None:
    (tmp_path / "at").mkdir()
    rows, scales = table().to(torch.float8_e4m3fn), torch.rand(8, 1)
    weight_map = {}
    for number, (name, tensor) in enumerate(
        {"a.wte.weight": rows, "a.wte.weight_scale_inv": scales, "b": table()}.items()
    ):
        save_file({name: tensor}, tmp_path / "at" / f"model-{number}.safetensors")
        weight_map[name] = f"model-{number}.safetensors"
    index = tmp_path / "at/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    repository = Repository(tmp_path / "at", tmp_path / "here")
    source = open_embedding(repository.fetch())
    assert {name for name in repository.fetched if "model-" in name} == {
        "model-0.safetensors",
        "model-1.safetensors",
    }
    assert torch.equal(source.read_rows(0, 8)[1], rows.float() * scales)


@pytest.mark.parametrize("others", [["b.safetensors"], ["model.safetensors", "m-1.safetensors"]])
def test_two_models_in_one_repository(tmp_path: Path, others: list[str]) -> None:
    (tmp_path / "at").mkdir()
    for name in others:
        save_file({"wte.weight": table()}, tmp_path / "at" / name)
    if "model.safetensors" in others:  # the index names the other one
        index = {"weight_map": {"wte.weight": others[1]}}
        (tmp_path / "at/model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file({"wte.weight": table()}, tmp_path / "at/a.safetensors")
        others = ["a.safetensors", *others]
    with pytest.raises(DataError, match=r"hf download owner/name") as error:
        Repository(tmp_path / "at", tmp_path / "here").fetch()
    assert all(name in error.value.what for name in others)


def test_an_index_without_its_files_is_not_followed(tmp_path: Path) -> None:
    write_single(tmp_path / "at", table())
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "at/model.safetensors.index.json").write_text(json.dumps(index))
    source = open_embedding(Repository(tmp_path / "at", tmp_path / "here").fetch())
    assert source.files == ("model.safetensors",)
    assert "not read: model.safetensors.index.json" in source.chosen_by


def test_sentence_transformers(tmp_path: Path) -> None:
    write_single(tmp_path / "at/0_Transformer", table())
    modules = [{"path": "0_Transformer"}, {"path": "1_Pooling"}]
    (tmp_path / "at/modules.json").write_text(json.dumps(modules))
    path = Repository(tmp_path / "at", tmp_path / "here").fetch()
    assert path == tmp_path / "here/0_Transformer"
    assert len(open_embedding(path).read_vocabulary().tokens) == 8


def test_gguf_parts_are_fetched_until_all_is_there(tmp_path: Path) -> None:
    (tmp_path / "at").mkdir()
    write_split(tmp_path / "at", ["tokens", "tensor", "rest"])
    (tmp_path / "at/mmproj-x.gguf").write_bytes(b"GGUF")
    repository = Repository(tmp_path / "at", tmp_path / "here")
    source = open_embedding(repository.fetch())
    assert repository.fetched == {"m-00001-of-00003.gguf", "m-00002-of-00003.gguf"}
    assert torch.equal(source.read_rows(0, 8)[1], table())


def test_adapters_and_pickles(tmp_path: Path) -> None:
    write_single(tmp_path / "at", table())
    settings = {"target_modules": ["q_proj", "embed_tokens"], "base_model_name_or_path": "o/base"}
    (tmp_path / "at/adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "at/adapter_model.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"adapter that changes the input embedding.*o/base"):
        open_embedding(Repository(tmp_path / "at", tmp_path / "here").fetch())
    with pytest.raises(
        DataError,
        match=r'owner/name has its weights only as pickles.*from_pretrained\("owner/name"\)',
    ):
        hub.fetch_files(["pytorch_model.bin"], "owner/name", None, lambda name: Path(name))


def test_single_gguf(tmp_path: Path) -> None:
    (tmp_path / "at").mkdir()
    kind = gguf.GGMLQuantizationType.F32
    write_gguf(tmp_path / "at/q8.gguf", table(), kind, BYTE_LEVEL, [1] * 8)
    repository = Repository(tmp_path / "at", tmp_path / "here", more=["pytorch_model.bin"])
    assert repository.fetch() == tmp_path / "here/q8.gguf"
    repository.files.append("q4.gguf")
    with pytest.raises(DataError, match=r"2 GGUF files: q4\.gguf, q8\.gguf.*hf download"):
        repository.fetch()


def test_hub_that_cannot_be_reached() -> None:
    program = (
        "from mltfr_dist.config import TableConfig\n"
        "from mltfr_dist.tables.extract import extract_table\n"
        "extract_table('owner/name', TableConfig())"
    )
    nowhere = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9"}  # a port that nothing listens on
    done = subprocess.run(
        [sys.executable, "-c", program], env=nowhere, capture_output=True, text=True, check=False
    )
    assert (
        "DataError: 'owner/name' is no path here and could not be fetched from the Hugging Face hub"
        in done.stderr
    )
