import json
from pathlib import Path

import pytest
from safetensors.torch import save_file
from table_files import RAW, table, write_single

from mltfr_dist.config import TableConfig
from mltfr_dist.errors import DataError
from mltfr_dist.tables.extract import extract_table


def extract_with(
    tmp_path: Path, file: str, content: str, num_rows: int = 8
) -> tuple[tuple[str, ...], dict[str, int]]:
    save_file({"wte.weight": table(num_rows)}, tmp_path / "x.safetensors")
    (tmp_path / file).write_text(content, encoding="utf-8")
    extracted = extract_table(str(tmp_path / "x.safetensors"), RAW)
    return extracted.vocabulary, {str(reason): count for reason, count in extracted.dropped.items()}


def test_unigram_tokenizer(tmp_path: Path) -> None:
    pieces = [
        ["<unk>", 0],
        ["<0x0A>", -1],
        ["▁", -1],
        ["▁the", -2],
        ["ing", -3],
        ["<extra_id_0>", 0],
    ]
    added = [
        {"id": 6, "content": "<extra>", "special": True},
        {"id": 7, "content": "plain", "special": False},
    ]
    content = {
        "added_tokens": added,
        "decoder": {"type": "Metaspace"},
        "model": {"type": "Unigram", "vocab": pieces},
    }
    kept, dropped = extract_with(tmp_path, "tokenizer.json", json.dumps(content))
    assert kept == (" the", "ing", "plain")
    assert dropped == {"special": 2, "byte": 1, "blank": 1, "unused": 1}


def test_wordpiece_vocab_txt(tmp_path: Path) -> None:
    kept, dropped = extract_with(
        tmp_path, "vocab.txt", "[PAD]\n[unused0]\n[CLS]\nthe\n##ing\n##\n[i]\n<div>\n"
    )
    assert kept == (" the", "ing", " ##", " [i]", " <div>")
    assert dropped == {"special": 2, "unused": 1}


def test_vocab_json_with_its_neighbours(tmp_path: Path) -> None:
    decoder = {"2": {"content": "<tool>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"caf\u00e9": 3}))
    kept, dropped = extract_with(
        tmp_path, "vocab.json", json.dumps({"\u0120the": 0, "ing": 1}), num_rows=6
    )
    assert kept == (" the", "ing", "café")
    assert dropped == {"no_entry": 2, "special": 1}


def test_end_of_word_marks(tmp_path: Path) -> None:
    kept, _ = extract_with(tmp_path, "vocab.json", json.dumps({"the</w>": 0, "in": 1}))
    assert kept == ("the ", "in")


def test_tokenizer_config_that_is_a_tokenizer(tmp_path: Path) -> None:
    content = {"model": {"type": "BPE", "vocab": {"▁king": 0, "s": 2}}, "added_tokens": []}
    kept, dropped = extract_with(tmp_path, "tokenizer_config.json", json.dumps(content))
    assert kept == (" king", "s")
    assert dropped == {"no_entry": 6}  # a gap in the ids, and the padding rows


def test_keep_special_keeps_all_but_rows_without_a_token(tmp_path: Path) -> None:
    folder = write_single(tmp_path, table(11))
    extracted = extract_table(str(folder), TableConfig(keep_special=True, normalise="none"))
    assert extracted.dropped == {"no_entry": 3}
    assert extracted.vocabulary == (
        "<s>",
        "<|im_start|>",
        " ",
        "\ufffd",
        " the",
        "ing",
        " café",
        "[unused3]",
    )


def test_vocabulary_larger_than_the_table(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"wte\.weight has 1 rows but the vocabulary in vocab\.txt has 3 ids"
    ):
        extract_with(tmp_path, "vocab.txt", "a\nb\nc\n", num_rows=1)


def test_nothing_meaningful_left(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Only 0 of 8 rows of wte\.weight have a meaningful token"):
        extract_with(tmp_path, "vocab.txt", "<s>\n</s>\n")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{", "cannot be read"),
        ("tokenizer.json", "{}", "holds no vocabulary"),
        ("tokenizer.json", '{"model": {"vocab": {"a": "b"}}}', "is malformed"),
        ("tokenizer.json", '{"model": {"vocab": {}}}', "is empty"),
        ("tokenizer_config.json", "{}", "No vocabulary in"),
    ],
)
def test_bad_vocabularies(tmp_path: Path, file: str, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        extract_with(tmp_path, file, content)


def test_vocabulary_given_must_exist(tmp_path: Path) -> None:
    write_single(tmp_path, table())
    with pytest.raises(DataError, match=r"The vocabulary file .*none\.json does not exist"):
        extract_table(str(tmp_path), TableConfig(vocabulary=tmp_path / "none.json"))
