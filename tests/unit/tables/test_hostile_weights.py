"""Random and mutated headers: the right rows or a clear error, soon and within little memory."""

import json
import resource
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from table_files import BYTE_LEVEL, table, write_gguf

from mltfr_dist.errors import DataError, MltfrError
from mltfr_dist.tables.checkpoints import open_embedding

FUZZ = settings(
    max_examples=150, deadline=2000, suppress_health_check=list(HealthCheck), derandomize=True
)
ROWS = {"model.embed_tokens.weight": table(), "model.norm.weight": torch.ones(4)}
SAFETENSORS = save(ROWS)
HEADER = json.loads(SAFETENSORS[8 : 8 + struct.unpack("<Q", SAFETENSORS[:8])[0]])


def valid_gguf() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        write_gguf(path, table(), gguf.GGMLQuantizationType.F32, BYTE_LEVEL, [1] * 8)
        return path.read_bytes()


GGUF = valid_gguf()


def hold(ending: str, content: bytes, *, rows: torch.Tensor | None = None) -> None:
    """Open, read all rows and the vocabulary: either that works, or the error is one for users."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{ending}"
        path.write_bytes(content)
        try:
            source = open_embedding(path)
            read = torch.cat([block for _, block in source.blocks()])
            assert read.shape == (source.num_rows, source.dim)
            if rows is not None:
                assert torch.equal(read, rows)
            source.read_vocabulary()
        except MltfrError as error:
            remedy = error.remedy
        else:
            remedy = "none is needed"
    assert remedy
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def mutations(content: bytes) -> st.SearchStrategy[bytes]:
    """A few places overwritten, cut out or doubled."""
    place = st.integers(0, min(len(content), 1200) - 1)
    change = st.tuples(place, st.binary(min_size=1, max_size=9), st.booleans())

    def apply(changes: list[tuple[int, bytes, bool]]) -> bytes:
        changed = bytearray(content)
        for at, new, overwrite in changes:
            changed[at : at + (len(new) if overwrite else 0)] = new
        return bytes(changed)

    return st.lists(change, min_size=1, max_size=4).map(apply)


@pytest.mark.parametrize("ending", [".gguf", ".safetensors", ".vec"])
def test_random_bytes(ending: str) -> None:
    magic = {".gguf": b"GGUF\3\0\0\0", ".safetensors": b"", ".vec": b"2 3\n"}[ending]

    @FUZZ
    @given(st.binary(max_size=300), st.booleans())
    def check(content: bytes, begins_right: bool) -> None:
        hold(ending, magic * begins_right + content)

    check()


@FUZZ
@given(mutations(GGUF))
def test_mutated_gguf(content: bytes) -> None:
    hold(".gguf", content)


@FUZZ
@given(mutations(SAFETENSORS))
def test_mutated_safetensors(content: bytes) -> None:
    hold(".safetensors", content)


SIZES = st.sampled_from([0, 1, 8, 32, 1 << 31, 1 << 40, 1 << 62, 1 << 63, (1 << 64) - 1])


@FUZZ
@given(SIZES, SIZES, SIZES, st.sampled_from([0, 1, 8, 2, 39, 99]))
def test_gguf_sizes(columns: int, rows: int, offset: int, kind: int) -> None:
    name = b"token_embd.weight"
    info = (
        struct.pack("<Q", len(name)) + name + struct.pack("<I2QIQ", 2, columns, rows, kind, offset)
    )
    hold(".gguf", b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + info + bytes(2048))


@FUZZ
@given(st.integers(0, 10), st.integers(0, 20), SIZES)
def test_gguf_lists(kind: int, element: int, count: int) -> None:
    name = b"tokenizer.ggml.tokens"
    field = struct.pack("<Q", len(name)) + name + struct.pack("<IIQ", 9, element, count)
    hold(".gguf", b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field + bytes(kind * 8))


def packed(header: Any, data: bytes = SAFETENSORS[-4 * 260 :], size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


VALUES = st.recursive(
    st.none() | st.booleans() | SIZES | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@FUZZ
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "F16", "BF16", "F8_E4M3", "F4", "I8", "BOOL", "X"]),
            "shape": st.lists(SIZES, max_size=3) | VALUES,
            "data_offsets": st.tuples(SIZES, SIZES) | VALUES,
        },
    )
)
def test_safetensors_entries(entry: dict[str, Any]) -> None:
    header = {**HEADER, "model.embed_tokens.weight": HEADER["model.embed_tokens.weight"] | entry}
    hold(".safetensors", packed(header))


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


DAMAGED: dict[str, Callable[[], bytes]] = {
    "header of 2^40 bytes": lambda: packed(HEADER, size=1 << 40),
    "header of 2^64 bytes": lambda: packed(HEADER, size=(1 << 64) - 1),
    "deep nesting": lambda: packed(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep metadata": lambda: packed(b'{"__metadata__":' * 50_000),
    "a shape with 0": lambda: packed({"wte.weight": entry([0, 32], 0, 0)}, b""),
    "a shape with 0 columns": lambda: packed({"wte.weight": entry([1 << 40, 0], 0, 0)}, b""),
    "beyond the end": lambda: packed({"wte.weight": entry([8, 32], 0, 1024)}, bytes(1000)),
    "negative": lambda: packed({"wte.weight": entry([8, 32], -1024, 0)}, bytes(1024)),
    "negative shape": lambda: packed({"wte.weight": entry([-8, -32], 0, 1024)}, bytes(1024)),
    "overlapping": lambda: packed(
        {"wte.weight": entry([8, 32], 0, 1024), "b": entry([8, 32], 0, 1024)}, bytes(1024)
    ),
    "a pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "empty": lambda: b"",
    "a page of HTML": lambda: b"<!DOCTYPE html><html>not found</html>",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_safetensors(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(DAMAGED[name]())
    with pytest.raises(DataError):
        open_embedding(tmp_path / "x.safetensors")
    hold(".safetensors", DAMAGED[name]())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[" * 100_000),
        ("config.json", "[]"),
        ("config.json", '{"model_type": '),
        ("config.json", '{"model_type": "llama", "num_hidden_layers": 100000000}'),
        ("config.json", '{"model_type": "llama", "vocab_size": -1, "quantization_config": 3}'),
        ("model.safetensors.index.json", "[" * 100_000),
        ("model.safetensors.index.json", '{"weight_map": {"wte.weight": "\\u0000"}}'),
        ("modules.json", '{"path": 1}'),
        ("adapter_config.json", "[]"),
    ],
)
def test_damaged_settings(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(SAFETENSORS)
    (tmp_path / name).write_text(content)
    try:
        assert torch.equal(open_embedding(tmp_path).read_rows(0, 8)[1], table())
    except DataError as error:
        message = str(error)
    else:
        message = name  # what is malformed there does not matter
    assert name in message


def test_pointers_name_git_lfs(tmp_path: Path) -> None:
    for name in ("model.safetensors", "x.gguf", "x.vec", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes(DAMAGED["a pointer"]())
        with pytest.raises(DataError, match=r"is a git-lfs pointer.*`git lfs pull`"):
            open_embedding(tmp_path if name.endswith("json") else tmp_path / name)
        (tmp_path / name).unlink()
