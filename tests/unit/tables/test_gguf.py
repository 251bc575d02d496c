"""GGUF: our header reader against the library's, split models, and damaged files."""

import os
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from table_files import BYTE_LEVEL, table, write_gguf, write_split

from mltfr_dist.errors import DataError
from mltfr_dist.tables.checkpoints import open_embedding
from mltfr_dist.tables.checkpoints.gguf_header import GgufHeader

Q = gguf.GGMLQuantizationType


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- our reader against the library's


@pytest.mark.parametrize("alignment", [None, 64, 8])
def test_header_equals_the_librarys(tmp_path: Path, alignment: int | None) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"a.{kind}", 100)
    writer.add_float32("a.float32", 0.1)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "café\n")
    for name, value in {
        "floats": [0.5, 0.25],
        "integers": [1, -2, 3],
        "flags": [True, False],
        "texts": ["", "Ġthe", "\u2581x", "日本"],
    }.items():
        writer.add_array(f"a.{name}", value)
    for number, kind in enumerate((Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q5_1)):
        rows = gguf.quantize(table(3 + number, 64).numpy(), kind)
        writer.add_tensor(f"t{number}", rows, raw_dtype=kind)
    writer.add_tensor("flat", np.ones(5, dtype=np.float32))
    writer.add_tensor("cube", np.ones((2, 3, 4), dtype=np.int32))
    close(writer)
    ours, theirs = GgufHeader(tmp_path / "x.gguf"), gguf.GGUFReader(tmp_path / "x.gguf")
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert ours.get(key) == field.contents(), key
    assert ours.get("nothing") is None
    assert {
        name: (one.shape, one.kind, one.offset) for name, one in ours.tensors.items()
    } == {
        one.name: (tuple(int(size) for size in one.shape), one.tensor_type, one.data_offset)
        for one in theirs.tensors
    }  # fmt: skip


def test_version_2(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, table(), Q.F32, BYTE_LEVEL, [1] * 8)
    path.write_bytes(b"GGUF\2" + path.read_bytes()[5:])
    assert torch.equal(open_embedding(path).read_rows(0, 8)[1], table())
    assert open_embedding(path).read_vocabulary().tokens[4] == " the"


READABLE = [
    kind
    for kind in gguf.GGML_QUANT_SIZES
    if kind in (Q.F32, Q.F16) or kind in gguf.quants._type_traits
]


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_every_format_is_dequantised_as_by_the_library(tmp_path: Path, kind: Q) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(0)
    raw = generator.integers(0, 60, (5, 512 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("token_embd.weight", raw, raw_shape=raw.shape, raw_dtype=kind)
    close(writer)
    source = open_embedding(tmp_path / "x.gguf")
    assert (source.num_rows, source.dim, source.dtype) == (5, 512, kind.name)
    whole = gguf.dequantize(gguf.GGUFReader(tmp_path / "x.gguf").tensors[0].data, kind)
    read = torch.cat([source.read_rows(start, start + 1)[1] for start in range(5)])
    assert np.array_equal(read.numpy(), np.asarray(whole, dtype=np.float32), equal_nan=True)


@pytest.mark.parametrize("kind", [Q.Q8_1, Q.I32, Q.Q1_0], ids=lambda kind: kind.name)
def test_formats_without_dequantisation_are_refused_at_once(tmp_path: Path, kind: Q) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.zeros((5, 256 // block * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("token_embd.weight", raw, raw_shape=raw.shape, raw_dtype=kind)
    close(writer)
    with pytest.raises(DataError, match=f"stored as {kind.name}, which cannot be read"):
        open_embedding(tmp_path / "x.gguf")


def test_a_large_vocabulary_is_read_fast(tmp_path: Path) -> None:
    count = 152_000
    tokens = [f"Ġtoken{index}" for index in range(count)]
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * count)
    writer.add_token_merges(["Ġ t"] * count)
    writer.add_tensor("token_embd.weight", np.zeros((count, 2), dtype=np.float16))
    close(writer)
    start = time.process_time()
    header = GgufHeader(tmp_path / "x.gguf")
    assert header.get("tokenizer.ggml.tokens") == tokens
    assert header.get("tokenizer.ggml.token_type") == [1] * count
    assert time.process_time() - start < 3


# --- split models


@pytest.mark.parametrize(
    "blocks", [["tokens", "rest", "tensor"], ["tensor", "tokens"], ["rest", "tensor", "tokens"]]
)
def test_split(tmp_path: Path, blocks: list[str]) -> None:
    paths = write_split(tmp_path, blocks)
    (tmp_path / "mmproj-model-f16.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, *paths):
        source = open_embedding(path)
        assert torch.equal(source.read_rows(0, 8)[1], table())
        assert source.read_vocabulary().tokens[4] == " the"
        assert source.licence == "mit"
    assert "not read: mmproj-model-f16.gguf" in open_embedding(tmp_path).chosen_by


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    paths = write_split(tmp_path, ["tokens", "rest", "tensor"])
    paths[2].unlink()
    with pytest.raises(
        DataError, match=r"holds the tensor token_embd\.weight; missing: .*m-00003-of-00003\.gguf"
    ):
        open_embedding(tmp_path)
    for path in write_split(tmp_path, ["tokens", "rest", "tensor"])[:1]:
        path.unlink()
    with pytest.raises(DataError, match=r"holds the vocabulary; missing: .*m-00001-of-00003\.gguf"):
        open_embedding(tmp_path)


def test_parts_of_other_models(tmp_path: Path) -> None:
    paths = write_split(tmp_path, ["tokens", "tensor"])
    paths[0].rename(tmp_path / "whole.gguf")
    with pytest.raises(DataError, match=r"whole\.gguf says that it is part 0 \(from 0\) of 2"):
        open_embedding(tmp_path / "whole.gguf")
    (tmp_path / "whole.gguf").rename(paths[0])
    paths[0].write_bytes(paths[1].read_bytes())
    with pytest.raises(DataError, match=r"00001-of-00002\.gguf says that it is part 1"):
        open_embedding(paths[0])
    other = tmp_path / "other"
    other.mkdir()
    write_split(other, ["tensor", "tensor"])
    with pytest.raises(DataError, match=r"both hold token_embd\.weight"):
        open_embedding(other)


# --- what changes the values


@pytest.mark.parametrize("other", ["token_embd.scale", "token_embd.weight.lora_a"])
def test_companions_are_refused(tmp_path: Path, other: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for name in ("token_embd.weight", "token_embd_norm.weight", other):
        writer.add_tensor(name, table().numpy())
    close(writer)
    with pytest.raises(DataError, match=rf"holds {other} beside token_embd\.weight"):
        open_embedding(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": [1, 2]}, "tokens is no list of texts"),
        ({"tokens": "the"}, "tokens is no list of texts"),
        ({"tokens": ["a"] * 8, "token_type": ["a"] * 8}, "token_type is no list of integers"),
        ({"tokens": ["a"] * 8, "token_type": [1] * 7}, "names 8 tokens but 7 token types"),
        ({"tokens": ["a"] * 8}, "does not say what kind of tokenizer"),
        ({"tokens": ["a"] * 8, "model": 3}, "does not say what kind of tokenizer"),
    ],
)
def test_malformed_vocabularies(tmp_path: Path, fields: dict, message: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for name, value in fields.items():
        add = {list: writer.add_array, str: writer.add_string, int: writer.add_uint32}[type(value)]
        add(f"tokenizer.ggml.{name}", value)
    writer.add_tensor("token_embd.weight", table().numpy())
    close(writer)
    with pytest.raises(DataError, match=message):
        open_embedding(tmp_path / "x.gguf").read_vocabulary()


def test_tokens_that_are_not_utf8(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", table(), Q.F32, BYTE_LEVEL, [1] * 8)
    content = (tmp_path / "x.gguf").read_bytes().replace("Ġthe".encode(), b"\xff\xfethe")
    (tmp_path / "x.gguf").write_bytes(content)
    vocabulary = open_embedding(tmp_path / "x.gguf").read_vocabulary()
    assert vocabulary.reasons[4] == "fragment"


# --- damaged


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(*fields: bytes, tensors: tuple[bytes, ...] = (), version: int = 3) -> bytes:
    counts = struct.pack("<IQQ", version, len(tensors), len(fields))
    return b"GGUF" + counts + b"".join(fields) + b"".join(tensors)


def tensor(*shape: int, offset: int = 0, kind: int = 0, name: str = "token_embd.weight") -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def nested(depth: int) -> bytes:
    return (
        text("n")
        + struct.pack("<I", 9)
        + struct.pack("<IQ", 9, 1) * depth
        + struct.pack("<IQ", 0, 0)
    )


HUGE = 1 << 40
DAMAGED = {
    "a list of 2^40 texts": (header(text("a") + struct.pack("<IIQ", 9, 8, HUGE)), "claims"),
    "a list of 2^40 bytes": (header(text("a") + struct.pack("<IIQ", 9, 0, HUGE)), "claims"),
    "a text of 2^63 bytes": (header(text("a") + struct.pack("<IQ", 8, 1 << 63)), "claims"),
    "a name of 2^40 bytes": (header(struct.pack("<QIQ", HUGE, 8, 1)), "name of"),
    "2^40 fields": (b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE) + bytes(64), "claims"),
    "2^40 tensors": (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0) + bytes(64), "claims"),
    "deep nesting": (header(nested(1000)), "nested too deep"),
    "an unknown type": (header(text("a") + struct.pack("<I", 99)), "unknown type 99"),
    "a list of an unknown type": (header(text("a") + struct.pack("<IIQ", 9, 99, 1)), "type 99"),
    "twice a field": (header(*[text("a") + struct.pack("<IB", 0, 1)] * 2), "two fields"),
    "a name that is no text": (header(struct.pack("<Q", 2) + b"\xff\xfe"), "claims|UTF-8"),
    "version 1": (header(version=1), "version 1"),
    "the other byte order": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "other byte order"),
    "empty": (b"", "cannot be read as GGUF"),
    "cut short": (b"GGUF\3\0", "claims"),
    "a shape with 0": (header(tensors=(tensor(32, 0),)) + bytes(64), r"the shape \[32, 0\]"),
    "no shape": (header(tensors=(tensor(),)) + bytes(64), r"the shape \[\]"),
    "a shape of 2^80": (header(tensors=(tensor(HUGE, HUGE),)), "claims the shape"),
    "2^31 dimensions": (
        header(tensors=(text("t") + struct.pack("<IQQ", 1 << 31, 0, 0),)),
        "dimensions",
    ),
    "beyond the end": (header(tensors=(tensor(32, 8),)) + bytes(64), "ends at byte"),
    "an offset beyond": (header(tensors=(tensor(4, 2, offset=1 << 62),)) + bytes(64), "ends at"),
    "half a block": (header(tensors=(tensor(33, 2, kind=8),)) + bytes(999), "the shape"),
    "an unknown format": (header(tensors=(tensor(4, 4, kind=77),)) + bytes(99), "format 77"),
    "twice a tensor": (header(tensors=(tensor(4, 2), tensor(4, 2))) + bytes(99), "two tensors"),
    "overlapping": (
        header(tensors=(tensor(4, 2), tensor(4, 2, offset=16, name="b"))) + bytes(99),
        "overlap",
    ),
    "no alignment": (header(text("general.alignment") + struct.pack("<II", 4, 12)), "no power"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged(tmp_path: Path, name: str) -> None:
    content, message = DAMAGED[name]
    (tmp_path / "x.gguf").write_bytes(content)
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=message):
        open_embedding(tmp_path / "x.gguf")
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_every_shorter_file_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", table(), Q.F32, BYTE_LEVEL, [1] * 8)
    content = (tmp_path / "x.gguf").read_bytes()
    end = open_embedding(tmp_path / "x.gguf").num_rows * 32 * 4
    for size in [*range(0, len(content) - end, 7), len(content) - 200]:
        (tmp_path / "y.gguf").write_bytes(content[:size])
        with pytest.raises(DataError):
            open_embedding(tmp_path / "y.gguf")


def test_the_command_says_so(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    program = "import sys; from mltfr_dist.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, "tables", str(tmp_path / "x.gguf")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "is a git-lfs pointer, not the file itself. Run `git lfs pull`" in done.stderr
    assert "Traceback" not in done.stderr
