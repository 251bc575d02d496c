"""Which tokens are special: by their form, by flags and lists, by having been added."""

import json
from pathlib import Path

import pytest

from mltfr_dist.errors import DataError
from mltfr_dist.tables.vocabulary import (
    DropReason,
    Vocabulary,
    drop_reason,
    find_vocabulary,
    from_ggml,
)


def write(folder: Path, **files: object) -> Vocabulary:
    """Write each as NAME.json and read what the folder holds."""
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return find_vocabulary(folder)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("▁<extra_id_0>", "unused"),
        ("<extra_id_99>", "unused"),
        ("<unused12>", "unused"),
        ("<reserved_106>", "unused"),
        ("<SPECIAL_12>", "unused"),
        ("[control_8]", "unused"),
        ("<unk_7>", "unused"),
        ("</s>NOTUSED", "unused"),
        ("madeupword0003", "unused"),
        ("[UNUSED_TOKEN_145]", "unused"),
        ("<null_1>", "unused"),
        ("<think>", "special"),
        ("</think>", "special"),
        ("<tool_call>", "special"),
        ("</tool_response>", "special"),
        ("[gMASK]", "special"),
        ("[TOOL_CALLS]", "special"),
        (">>fr<<", "special"),
        (">>cmn_Hans<<", "special"),
        ("<2en>", "special"),
        ("<｜end▁of▁sentence｜>", "special"),
        ("<mask_1>", "special"),
        ("<fim-prefix>", "special"),
        ("▁<PRE>", "special"),
        ("__start__", "special"),
        ("<|turn>", "special"),
        ("[|endofturn|]", "special"),
        ("<image_soft_token>", "special"),
        ("<0x0A>", "byte"),
        ("<div>", None),
        ("</p>", None),
        ("[i]", None),
        ("[0]", None),
        ("<T>", None),
        ("vector<int>", None),
        (">>>", None),
        ("<<", None),
        ("<|>", None),
        ("[a]", None),
        ("<h1>", None),
        (">>=", None),
        ("__init__", None),
        ("think", None),
        ("<", None),
        ("_", None),
    ],
)
def test_by_form(raw: str, reason: DropReason | None) -> None:
    assert drop_reason(raw, raw) == reason


def test_added_tokens_that_are_signs(tmp_path: Path) -> None:
    """Flagged or not; words and HTML that were added stay (Gemma adds tags)."""
    contents = ["<my_tool>", "</x>", "[EDGE]", "<table>", "</h1>", "café", "[i]", "<user>"]
    added = [{"id": 2 + i, "content": text, "special": False} for i, text in enumerate(contents)]
    model = {"type": "BPE", "vocab": {"▁the": 0, "s": 1}}
    result = write(tmp_path, tokenizer={"model": model, "added_tokens": added})
    assert result.reasons == (*[None] * 2, *["special"] * 3, *[None] * 5)


def test_ggml_user_defined_signs() -> None:
    """A DeepSeek-R1 distill of Qwen: neither is flagged as control."""
    tokens = ["Ġthe", "<tool_call>", "</think>", "<answer>", "<td>", "<|im_end|>", "of", "Ġ"]
    result = from_ggml(tokens, [1, 4, 4, 4, 4, 3, 2, 1], "gpt2", "x.gguf")
    reasons = (None, "special", "special", "special", None, "special", "special", "blank")
    assert result.reasons == reasons
    assert result.tokens[4] == "<td>"


def test_named_special_tokens(tmp_path: Path) -> None:
    """In special_tokens_map.json and tokenizer_config.json, as text, object, list or mapping."""
    result = write(
        tmp_path,
        vocab={"Ġthe": 0, "oov": 1, "__en__": 2, "eng_Latn": 3, "@@PAD@@": 4, "img": 5, "s": 6},
        special_tokens_map={
            "unk_token": "oov",
            "additional_special_tokens": ["__en__", {"content": "eng_Latn"}],
        },
        tokenizer_config={
            "pad_token": {"content": "@@PAD@@"},
            "extra_special_tokens": {"image_token": "img"},
            "add_bos_token": True,
            "bos_token": None,
        },
    )
    assert result.reasons == (None, *["special"] * 5, None)


def test_added_tokens_beside_a_tokenizer_json_that_lacks_them(tmp_path: Path) -> None:
    result = write(
        tmp_path,
        tokenizer={"model": {"type": "BPE", "vocab": {"▁the": 0, "s": 1}}},
        added_tokens={"café": 2, "<think>": 3},
        tokenizer_config={"added_tokens_decoder": {"4": {"content": "x", "special": True}}},
    )
    assert result.tokens == (" the", "s", "café", "<think>", "x")
    assert result.reasons == (None, None, None, "special", "special")


def test_an_added_token_may_name_a_reserved_place(tmp_path: Path) -> None:
    result = write(
        tmp_path,
        tokenizer={"model": {"type": "BPE", "vocab": {"▁the": 0, "s": 1, "<unused0>": 2}}},
        added_tokens={"café": 2},
    )
    assert result.tokens == (" the", "s", "café")
    assert result.reasons == (None, None, None)


def test_an_added_token_in_the_place_of_a_word(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"'s' has the id 1, as added_tokens\.json gives it to 'ca'"
    ):
        write(tmp_path, vocab={"▁the": 0, "s": 1}, added_tokens={"ca": 1})


def test_two_files_that_add_different_words_under_an_id(tmp_path: Path) -> None:
    settings = {"added_tokens_decoder": {"2": {"content": "one"}}}
    with pytest.raises(DataError, match="it gives the id 2 to 'two', but tokenizer_config"):
        write(
            tmp_path,
            vocab={"▁the": 0, "s": 1},
            added_tokens={"two": 2},
            tokenizer_config=settings,
        )


def test_added_runs_of_blanks_are_blank(tmp_path: Path) -> None:
    """Gemma lists its runs of blanks among the added tokens."""
    added = [{"id": 1, "content": "▁▁", "special": False}]
    model = {"type": "BPE", "vocab": {"▁the": 0, "▁▁": 1}}
    result = write(tmp_path, tokenizer={"model": model, "added_tokens": added})
    assert result.reasons == (None, "blank")
