"""Which kind of tokenizer a bare list of tokens is taken for, and what its tokens then read."""

import json
from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer

from mltfr_dist.errors import DataError
from mltfr_dist.tables.vocabulary import Vocabulary, find_vocabulary, read_vocabulary


def by_line(folder: Path, *tokens: str, name: str = "vocab.txt", **settings: str) -> Vocabulary:
    (folder / name).write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return read_beside(folder, name, settings)


def by_id(folder: Path, *tokens: str, **settings: str) -> Vocabulary:
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    return read_beside(folder, "vocab.json", settings)


def read_beside(folder: Path, name: str, settings: dict[str, str]) -> Vocabulary:
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return read_vocabulary(folder / name)


def test_gpt2_with_number_signs(tmp_path: Path) -> None:
    result = by_id(tmp_path, "Ġthe", "er", "####", "Ġof")
    assert result.tokens == (" the", "er", "####", " of")
    assert result.kind == "byte-level BPE: Ġ is a space, in 2 of 4 tokens"


CORPUS = [
    "## The naïve café – 12 €; ##x and ### of «Straße», привет, 日本語 ####",
    "the cat sat on the mat\n\tand it's 1234567890 ## #",
]


def test_byte_level_against_the_tokenizers_library(tmp_path: Path) -> None:
    """Every token of a trained vocabulary reads as the library decodes it."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(CORPUS * 20, vocab_size=600, show_progress=False)
    tokenizer.save_model(str(tmp_path))
    result = find_vocabulary(tmp_path)
    assert result.kind.startswith("byte-level BPE")
    ids = range(tokenizer.get_vocab_size())
    assert list(result.tokens) == [tokenizer.decode([index]) for index in ids]
    assert {"fragment", "blank", None} == set(result.reasons)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        # CLIP: bytes in GPT-2's alphabet and a mark at the word's end.
        (["cafÃ©</w>", "ca", "the</w>"], ("café ", "ca", "the ")),
        # XLM, Herbert, Flaubert: the same mark, but plain text ("été" is no text as bytes).
        (["été</w>", "ca", "był</w>", "ćma</w>"], ("été ", "ca", "był ", "ćma ")),
        # CTRL, BlenderBot small: @@ is continued by the next token.
        (["mu@@", "sic", "the"], ("mu", "sic ", "the ")),
        # MarianMT: pieces of SentencePiece.
        (["▁the", "s", "</s>"], (" the", "s", "</s>")),
        # No marks at all: as they stand.
        (["L", "A", "G"], ("L", "A", "G")),
    ],
)
def test_marks(tmp_path: Path, tokens: list[str], expected: tuple[str, ...]) -> None:
    assert by_id(tmp_path, *tokens).tokens == expected


def test_wordpiece_with_a_letter_that_is_a_byte_elsewhere(tmp_path: Path) -> None:
    """Multilingual BERT has the letter Ġ (Maltese) as tokens of its own."""
    words = [f"word{n}" for n in range(30)] + [f"##{n}ing" for n in range(30)]
    result = by_line(tmp_path, "[PAD]", "Ġ", "##Ġ", "日", *words)
    assert result.tokens[1:4] == (" Ġ", "Ġ", " 日")
    assert result.kind.startswith("WordPiece: ## continues a word, in 31 of")


def test_wordpiece_without_marks_by_its_class(tmp_path: Path) -> None:
    plain = by_line(tmp_path, "[CLS]", "的", "了")
    assert plain.tokens == ("[CLS]", "的", "了")
    assert plain.kind == "plain tokens: no marks"
    declared = by_line(tmp_path, "[CLS]", "的", "了", tokenizer_class="BertTokenizerFast")
    assert declared.tokens == ("[CLS]", " 的", " 了")
    assert declared.kind == "WordPiece: tokenizer_class of tokenizer_config.json"


def test_config_json_is_asked_where_nothing_else_speaks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "esm"}')
    assert by_line(tmp_path, "<cls>", "L", "A").kind == "plain tokens: model_type of config.json"


def test_marks_of_two_kinds_are_in_doubt_without_a_class(tmp_path: Path) -> None:
    tokens = ["Ġthe", "##ing", "Ġof", "##er"]
    with pytest.raises(
        DataError, match=r"The kind of tokenizer of vocab\.json is in doubt: it has"
    ):
        by_id(tmp_path, *tokens)
    as_bert = by_id(tmp_path, *tokens, tokenizer_class="BertTokenizer")
    assert as_bert.tokens == (" Ġthe", "ing", " Ġof", "er")
    as_gpt2 = by_id(tmp_path, *tokens, tokenizer_class="GPT2Tokenizer")
    assert as_gpt2.tokens == (" the", "##ing", " of", "##er")


def test_merges_beside_it_speak_against_wordpiece(tmp_path: Path) -> None:
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ t\n")
    assert by_id(tmp_path, "Ġthe", "##x", "er").tokens == (" the", "##x", "er")


def test_clear_marks_win_over_a_wrong_class(tmp_path: Path) -> None:
    result = by_id(tmp_path, "Ġthe", "ing", tokenizer_class="BertTokenizer")
    assert result.tokens == (" the", "ing")
    assert result.kind.endswith("though tokenizer_class of tokenizer_config.json says WordPiece")


def test_a_byte_level_class_over_text_that_is_none_is_in_doubt(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="says byte-level BPE, the tokens do not"):
        by_id(tmp_path, "été", "naïf", tokenizer_class="RobertaTokenizer")


def test_whole_words_begin_words(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"king": 0, "queen": 1}}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    assert find_vocabulary(tmp_path).tokens == (" king", " queen")


def test_a_tokenizer_json_that_says_nothing_is_told_by_its_tokens(tmp_path: Path) -> None:
    model = {"type": "BPE", "vocab": {"Ġthe": 0, "ing": 1}}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    assert find_vocabulary(tmp_path).tokens == (" the", "ing")
