"""Formats of vocabularies: each is recognised by its content and read right, or refused."""

import base64
import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from transformers import AutoTokenizer

from mltfr_dist.errors import DataError
from mltfr_dist.tables.vocabulary import (
    TOKENIZER_FILES,
    Vocabulary,
    find_vocabulary,
    from_ggml,
    read_vocabulary,
)


def state_class(folder: Path, name: str) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))


# --- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.txt", "the 900\nmu@@ 600\n", "a token and its count a line"),
        ("dict.txt", "the 900\nof 600\n", "a token and its count a line"),
        ("vocab.txt", "the 900\nof\nmu@@ 600\n", "have more than a token, such as 'the 900'"),
        ("vocab.txt", "the\t-3.1\n▁of\t-4\n", "have more than a token"),
        ("vocab.csv", "the,0\nof,1\n", "have more than a token, such as 'the,0'"),
        ("vocab.txt", "b'\\x00'\n'the'\n", "have more than a token"),
        ("words.vec", "the 0.1 0.2 0.3\nof 0.4 0.5 0.6\n", "have more than a token"),
        ("README.md", "# A model\n\nIt reads text.\n", "have more than a token"),
        ("merges.txt", "#version: 0.2\nĠ t\nh e\n", "lists the merges"),
        ("merges.txt", "Ġ t\nh e\nĠ 1\nin g\nr e\no n\na t\ne r\ni s\no r\n", "lists the merges"),
        ("bpe.codes", "t h 1234\nth e</w> 99\n", "lists the merges"),
    ],
)
def test_text_that_is_no_list_of_tokens(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_vocabulary(tmp_path / name)


@pytest.mark.parametrize("name", ["PhobertTokenizer", "BertweetTokenizer"])
def test_fairseq_dictionary_of_a_known_class(tmp_path: Path, name: str) -> None:
    """As the transformers library numbers it."""
    (tmp_path / "vocab.txt").write_text("the 900\nmu@@ 600\nsic 500\n")
    (tmp_path / "bpe.codes").write_text("m u 9\n")
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    state_class(tmp_path, name)
    result = find_vocabulary(tmp_path)
    assert result.tokens == ("<s>", "<pad>", "</s>", "<unk>", "the ", "mu", "sic ")
    assert result.reasons == ("special",) * 4 + (None,) * 3
    encoder = AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    assert (encoder["the"], encoder["mu@@"], encoder["sic"]) == (4, 5, 6)


def test_fairseq_dictionary_with_a_token_twice(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("the 900\n<pad> 600\n")
    state_class(tmp_path, "PhobertTokenizer")
    with pytest.raises(DataError, match="'<pad>' stands twice"):
        find_vocabulary(tmp_path)


def test_line_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes("\ufeff[PAD]\r\nthe\r\n##ing\r\n".encode())
    assert find_vocabulary(tmp_path).tokens == ("[PAD]", " the", "ing")


def test_rwkv_text(tmp_path: Path) -> None:
    lines = [
        "1 '\\x00' 1",
        "2 '\\n' 1",
        "3 ' the' 4",
        "4 b'\\xe6\\x97' 2",
        "5 '日' 3",
        '6 "it\'s" 4',
        "7 '\\u00e9' 2",
        "9 '\\\\n' 2",
    ]
    (tmp_path / "rwkv_vocab_v20230424.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = find_vocabulary(tmp_path)
    assert result.tokens[2:] == ("\n", " the", "\ufffd", "日", "it's", "é", None, "\\n")
    assert result.reasons[2:] == ("blank", None, "fragment", None, None, None, "no_entry", None)


def test_rwkv_text_with_a_wrong_length(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("1 'the' 3\n2 'of' 7\n")
    with pytest.raises(DataError, match="line 2 is no id, literal and length"):
        find_vocabulary(tmp_path)


# --- tiktoken ------------------------------------------------------------------------------------

RANKS = {b"!": 0, b" the": 1, b"ing": 2, b"\xe6\x97": 3, " café".encode(): 4, b"\n\n": 5}


@pytest.mark.parametrize("name", ["qwen.tiktoken", "other.tiktoken", "tokenizer.model"])
def test_tiktoken_ranks(tmp_path: Path, name: str) -> None:
    """Llama 3 has them under the name of a SentencePiece model."""
    path = tmp_path / name
    path.write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in RANKS.items())
    )
    (tmp_path / "added_tokens.json").write_text('{"<|im_start|>": 7}')
    result = find_vocabulary(tmp_path)
    library = tiktoken.Encoding("x", pat_str=r".+", mergeable_ranks=RANKS, special_tokens={})
    expected = [library.decode([rank]) for rank in RANKS.values()]
    assert list(result.tokens) == [*expected, None, "<|im_start|>"]
    assert result.reasons[3:] == ("fragment", None, "blank", "no_entry", "special")
    assert read_vocabulary(path) == result


def test_tiktoken_with_a_damaged_line(tmp_path: Path) -> None:
    (tmp_path / "a.tiktoken").write_text("IQ== 0\nIg== 1\n???? 2\n" + "Ig== 9\n" * 200)
    with pytest.raises(DataError, match="line 3 is no base64 and rank"):
        read_vocabulary(tmp_path / "a.tiktoken")


def test_tekken(tmp_path: Path) -> None:
    """Mistral's: ids follow the special tokens, and ranks beyond the stated size have no row."""
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for token, rank in RANKS.items()
    ]
    content = {
        "config": {"default_vocab_size": 7, "default_num_special_tokens": 3},
        "vocab": vocab,
        "special_tokens": [{"rank": 0, "token_str": "<unk>"}, {"rank": 2, "token_str": "[X]"}],
    }
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps(content))
    result = find_vocabulary(tmp_path)
    assert result.tokens == ("<unk>", None, "[X]", "!", " the", "ing", "\ufffd")
    assert result.reasons == ("special", "no_entry", "special", None, None, None, "fragment")
    path.write_text(json.dumps(content | {"vocab": [{"rank": 0, "token_bytes": "?"}]}))
    with pytest.raises(DataError, match=r"'\?' is no base64"):
        find_vocabulary(tmp_path)


# --- SentencePiece -------------------------------------------------------------------------------

SENTENCES = ["the cat sat on the mat with a hat", "kings and queens of the realm"] * 20
T5 = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
BYTES = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 330}


def train(**options: object) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"vocab_size": 60} | options,
    )
    return model.getvalue()


@pytest.mark.parametrize(
    ("name", "file", "options"),
    [
        ("XLMRobertaTokenizer", "sentencepiece.bpe.model", {}),
        ("CamembertTokenizer", "sentencepiece.bpe.model", {}),
        ("MBartTokenizer", "sentencepiece.bpe.model", {}),
        ("NllbTokenizer", "sentencepiece.bpe.model", {}),
        ("SeamlessM4TTokenizer", "sentencepiece.bpe.model", {}),
        ("PegasusTokenizer", "spiece.model", T5),
        ("T5Tokenizer", "spiece.model", T5),
        ("XLNetTokenizer", "spiece.model", {}),
        ("RemBertTokenizer", "sentencepiece.model", {}),
        ("DebertaV2Tokenizer", "spm.model", {}),
        ("LlamaTokenizer", "tokenizer.model", BYTES),
    ],
)
def test_ids_of_pieces_as_the_transformers_library_has_them(
    tmp_path: Path, name: str, file: str, options: dict[str, object]
) -> None:
    (tmp_path / file).write_bytes(train(**options))
    state_class(tmp_path, name)
    result = find_vocabulary(tmp_path)
    library = AutoTokenizer.from_pretrained(tmp_path)
    words = [index for index, reason in enumerate(result.reasons) if reason is None]
    expected = [str(piece).replace("▁", " ") for piece in library.convert_ids_to_tokens(words)]
    assert [result.tokens[index] for index in words] == expected
    assert {" a", "c"} <= set(expected)
    assert result.kind.endswith("by tokenizer_class of tokenizer_config.json")


def test_bartpho_takes_its_ids_from_its_dictionary(tmp_path: Path) -> None:
    """Its SentencePiece model holds pieces of other languages, which have no rows."""
    (tmp_path / "sentencepiece.bpe.model").write_bytes(train())
    (tmp_path / "dict.txt").write_text("▁a 9\nc 8\n", encoding="utf-8")
    state_class(tmp_path, "BartphoTokenizer")
    assert find_vocabulary(tmp_path).tokens == ("<s>", "<pad>", "</s>", "<unk>", " a", "c")


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        ("spiece.model", {}, "no file beside it does"),
        ("sentencepiece.bpe.model", {}, "no file beside it does"),
        ("sentencepiece.bpe.model", {"tokenizer_class": "BarthezTokenizer"}, "barthez"),
        ("sentencepiece.bpe.model", {"model_type": "mbart"}, "model_type of config.json: mbart"),
        ("tokenizer.model", {"model_type": "new"}, "model_type of config.json: new"),
    ],
)
def test_ids_of_pieces_in_doubt(
    tmp_path: Path, file: str, settings: dict[str, str], message: str
) -> None:
    """BARThez is of type mbart and numbers its pieces otherwise."""
    (tmp_path / file).write_bytes(train())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mbart"} | settings))
    if not settings:
        (tmp_path / "config.json").unlink()
    with pytest.raises(DataError, match=rf"is in doubt: the tokenizer's class.*{message}"):
        find_vocabulary(tmp_path)


def test_the_remedy_of_doubtful_ids_works(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(train(**T5))
    with pytest.raises(DataError) as caught:
        find_vocabulary(tmp_path)
    stated = '{"tokenizer_class": "T5Tokenizer"}'
    assert stated in caught.value.remedy
    (tmp_path / "tokenizer_config.json").write_text(stated)
    assert find_vocabulary(tmp_path).reasons[:3] == ("special",) * 3


def test_pieces_that_do_not_fit_the_class(tmp_path: Path) -> None:
    """XLM-R's layout leaves out three special pieces at the start; here the third is a word."""
    (tmp_path / "sentencepiece.bpe.model").write_bytes(train(bos_id=-1, eos_id=1, unk_id=0))
    state_class(tmp_path, "XLMRobertaTokenizer")
    with pytest.raises(DataError, match="its first pieces do not fit"):
        find_vocabulary(tmp_path)


def test_llama_model_by_its_bytes_and_its_name(tmp_path: Path) -> None:
    (tmp_path / "any.model").write_bytes(train(**BYTES))
    result = read_vocabulary(tmp_path / "any.model")
    assert result.kind == "SentencePiece: piece n has the id n + 0 by its pieces for bytes"
    assert result.reasons.count("byte") == 256
    (tmp_path / "tokenizer.model").write_bytes(train())
    assert find_vocabulary(tmp_path).kind.endswith("by its name")


def test_without_the_sentencepiece_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train())
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(DataError, match=r"pip install mltfr-dist\[tokenizers\]"):
        find_vocabulary(tmp_path)


# --- GGUF ----------------------------------------------------------------------------------------


def ggml(model: str, *tokens: str, types: list[int] | None = None) -> Vocabulary:
    return from_ggml([*tokens], types, model, "x.gguf")


def test_ggml_byte_level_under_another_name() -> None:
    for model in ("llama", "hunyuan"):
        result = ggml(model, "Ġthe", "ing", "ĠcafÃ©", "Ċ")
        assert result.tokens == (" the", "ing", " café", "\n")
    assert ggml("llama", "Ġthe").kind.endswith(
        "though tokenizer.ggml.model llama says SentencePiece"
    )


def test_ggml_pieces_under_gpt2() -> None:
    assert ggml("gpt2", "▁the", "ing", "日").tokens == (" the", "ing", "日")


def test_ggml_rwkv_escapes() -> None:
    result = ggml("rwkv", "<s>", "\\n", " the", "\\xe6\\x97\\xa5", "\\xe6", "\\\\n")
    assert result.tokens == ("<s>", "\n", " the", "日", "\ufffd", "\\n")
    assert result.reasons == ("special", "blank", None, None, "fragment", None)


def test_ggml_bert() -> None:
    assert ggml("bert", "▁the", "ing", "[CLS]", types=[1, 1, 3]).tokens[:2] == (" the", "ing")
    assert ggml("bert", "the", "##ing").tokens == (" the", "ing")


@pytest.mark.parametrize(
    ("tokens", "types", "message"),
    [
        (["a", 5], None, "something other than strings"),
        (["a", b"b"], None, "something other than strings"),
        (["a", "b"], [1], "2 tokens but 1 token types"),
        (["a", "b"], [1, 17], "17 is no token type"),
        (["a", "b"], [1, 1.0], "1.0 is no token type"),
        ([], None, "is empty"),
    ],
)
def test_ggml_malformed(tokens: list[str], types: list[int] | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_ggml(tokens, types, "gpt2", "x.gguf")


# --- where it lies -------------------------------------------------------------------------------


def test_a_folder_is_a_vocabulary_too(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("the\n##ing\n")
    assert read_vocabulary(tmp_path) == read_vocabulary(tmp_path / "vocab.txt")


def test_the_hub_route_can_fetch_all_that_is_looked_at() -> None:
    needed = {"tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json"}
    assert needed | {"tokenizer.model", "config.json"} <= set(TOKENIZER_FILES)
