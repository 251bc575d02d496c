"""Damaged and hostile vocabularies: always a clear error, quickly and in little memory."""

import json
import resource
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from mltfr_dist.errors import DataError, MltfrError
from mltfr_dist.tables.vocabulary import Vocabulary, find_vocabulary, from_ggml, read_vocabulary

GOOD = '{"Ġthe": 0, "ing": 1}'


def tokenizer(vocab: object, **more: object) -> str:
    return json.dumps({"model": {"type": "BPE", "vocab": vocab}} | more)


BAD_IDS = [
    ('{"the": 0, "of": -1}', r"the id of 'of' is -1, no whole number"),
    ('{"the": 0, "of": 1.5}', r"the id of 'of' is 1\.5"),
    ('{"the": 0, "of": 1.0}', r"the id of 'of' is 1\.0"),
    ('{"the": 0, "of": true}', r"the id of 'of' is True"),
    ('{"the": 0, "of": "1"}', r"the id of 'of' is '1'"),
    ('{"the": 0, "of": null}', r"the id of 'of' is None"),
    ('{"the": 0, "of": NaN}', r"the id of 'of' is nan"),
    ('{"the": 0, "of": 0}', r"'the' and 'of' both have the id 0"),
    ('{"the": 0, "the": 1}', r"the key 'the' stands twice"),
    ('{"the": 0, "of": 100000000}', r"the id of 'of' is 100,000,000, with 2 tokens"),
    ('{"the": 0, "of": 1000000000000}', r"the id of 'of' is 1,000,000,000,000, with 2 tokens"),
    ('{"the": 0, "of": 1e400}', r"the id of 'of' is inf"),
    ('{"the": 0, "of": ' + "9" * 5000 + "}", r"cannot be read: Exceeds the limit"),
    ('{"the": 0, "\\ud800": 1}', r"the token '\\ud800' holds half a UTF-16 pair"),
]


@pytest.mark.parametrize(("content", "message"), BAD_IDS)
def test_ids_of_a_vocab_json(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "vocab.json").write_text(content)
    with pytest.raises(DataError, match=message):
        find_vocabulary(tmp_path)


@pytest.mark.parametrize(("content", "message"), BAD_IDS)
def test_ids_of_a_tokenizer_json(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": ' + content + "}}")
    with pytest.raises(DataError, match=message):
        find_vocabulary(tmp_path)


def test_ids_a_little_beyond_the_tokens_are_sound(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"the": 0, "of": 70000}')
    result = find_vocabulary(tmp_path)
    assert len(result.tokens) == len(result.reasons) == 70001
    assert result.reasons.count("no_entry") == 69999


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", tokenizer(["the", "of"]), r"'the' stands where \[piece, score\]"),
        ("tokenizer.json", tokenizer([["the", -1], ["of"]]), r"\['of'\] stands where"),
        ("tokenizer.json", tokenizer([["the", -1], [5, 0]]), r"\[5, 0\] stands where"),
        ("tokenizer.json", tokenizer([["the", -1], ["of", "x"]]), r"stands where"),
        ("tokenizer.json", tokenizer("the"), "no object and no list"),
        ("tokenizer.json", tokenizer({"a": 0}, added_tokens=["x"]), "no list of objects"),
        ("tokenizer.json", tokenizer({"a": 0}, added_tokens={"x": 1}), "no list of objects"),
        ("tokenizer.json", tokenizer({"a": 0}, added_tokens=[{"id": 1}]), "is no added token"),
        ("tokenizer.json", tokenizer({"a": 0}, added_tokens=[{"content": "x"}]), "is None, no"),
        ("tokenizer.json", "[" * 100_000, "nests too deeply"),
        ("tokenizer.json", tokenizer({"a": 0})[:-1], "cannot be read"),
        ("vocab.json", '{"en": {"the": 0}}', "holds no vocabulary"),
        ("vocab.json", '["the", "of"]', "holds no vocabulary"),
        ("vocab.json", '{"0": "the"}', "holds no vocabulary"),
        ("vocab.json", "", "is empty"),
        ("vocab.txt", "\n\n", "is empty"),
    ],
)
def test_malformed(tmp_path: Path, file: str, content: str, message: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=message):
        find_vocabulary(tmp_path)


def test_components_nested_as_deep_as_json_goes(tmp_path: Path) -> None:
    deep = '{"a":' * 700 + "{}" + "}" * 700
    text = '{"model": {"vocab": {"the": 0}}, "decoder": ' + deep + "}"
    (tmp_path / "tokenizer.json").write_text(text)
    assert find_vocabulary(tmp_path).tokens == ("the",)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 17518497\n"


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "vocab.txt", "tokenizer.model", "tokenizer_config.json"]
)
def test_git_lfs_pointer(tmp_path: Path, name: str) -> None:
    (tmp_path / "vocab.json").write_text(GOOD)
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(DataError, match=r"is a git-lfs pointer.*Run `git lfs pull`"):
        read_vocabulary(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF\3\0\0\0" + bytes(16), "it is a GGUF file"),
        (save({"x": np.ones(2)}), "it is a safetensors file"),
        (b"PK\3\4" + bytes(30), "it is a zip archive"),
        (b"\x80\2}q\0.", "it is a Python pickle"),
        (b"\x1f\x8b\x08\0\0", "compressed by gzip"),
        (bytes(range(256)), "it is not UTF-8 text"),
        (b"the\0of\0", "it holds zero bytes"),
        ("the\nof\n".encode("utf-16"), "it is not UTF-8 text"),
        (b"the\ncaf\xe9\n", "it is not UTF-8 text"),
    ],
)
def test_binary_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_vocabulary(tmp_path / "vocab.txt")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", "{", r"tokenizer_config\.json.* cannot be read"),
        ("tokenizer_config.json", "[]", "holds no JSON object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', GOOD),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "is no object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"2": "x"}}', "'x' is no added"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"-2": {"content": "x"}}}', "is '-2'"),
        ("tokenizer_config.json", '{"tokenizer_class": 5, "pad_token": [7]}', GOOD),
        ("added_tokens.json", '{"x": "y"}', r"malformed: the id of 'x' is 'y'"),
        ("added_tokens.json", '{"x": 1000000000000}', "the id of 'x' is 1,000,000,000,000"),
        ("added_tokens.json", '{"\\udfff": 2}', "holds half a UTF-16 pair"),
        ("special_tokens_map.json", "null", "holds no JSON object"),
        ("config.json", "\\", r"config\.json.* cannot be read"),
    ],
)
def test_damaged_neighbours(tmp_path: Path, file: str, content: str, message: str) -> None:
    """Beside a good vocab.json; ``GOOD`` says that the neighbour does no harm."""
    (tmp_path / "vocab.json").write_text(GOOD)
    (tmp_path / file).write_text(content)
    if message == GOOD:
        assert find_vocabulary(tmp_path).tokens == (" the", "ing")
        return
    with pytest.raises(DataError, match=message) as caught:
        find_vocabulary(tmp_path)
    assert file in str(caught.value)


@pytest.mark.parametrize("sign", ["<" + "_" * 100_000, ">>ab" + "_a" * 50_000, "<|" * 50_000])
def test_long_signs_cost_no_time(tmp_path: Path, sign: str) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"▁the": 0, sign: 1}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({sign: 1}))
    start = time.process_time()
    assert find_vocabulary(tmp_path).reasons == (None, None)
    assert time.process_time() - start < 1


def test_two_added_tokens_with_one_id(tmp_path: Path) -> None:
    added = [{"id": 1, "content": text, "special": True} for text in ("<a>", "<b>")]
    (tmp_path / "tokenizer.json").write_text(tokenizer({"the": 0}, added_tokens=added))
    with pytest.raises(DataError, match=r"the id 1 to '<b>', but tokenizer\.json to '<a>'"):
        find_vocabulary(tmp_path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "vocab.txt").open("wb") as file:
        file.write(b"the\n")
        file.truncate(1 << 33)
    with pytest.raises(DataError, match="more than 128 MiB"):
        find_vocabulary(tmp_path)


def test_no_remedy_is_written_as_an_override(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--vocabulary PATH"):
        find_vocabulary(tmp_path)


# --- fuzz ----------------------------------------------------------------------------------------

FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
)
SEEDS = (
    tokenizer({"▁the": 0, "ing": 1}, added_tokens=[{"id": 2, "content": "x", "special": True}]),
    json.dumps({"model": {"type": "Unigram", "vocab": [["▁the", -1.5], ["</s>", 0]]}}),
    GOOD,
    "[PAD]\nthe\n##ing\n",
    "the 900\nmu@@ 600\n",
    "1 'the' 3\n2 '\\n' 1\n",
    "IQ== 0\nIg== 1\n",
    '{"<think>": 2}',
    '{"added_tokens_decoder": {"2": {"content": "x"}}, "tokenizer_class": "BertTokenizer"}',
)
TOKENS = st.text(max_size=6) | st.sampled_from(["▁the", "Ġof", "##s", "a</w>", "a@@", "<s>"])
NUMBERS = st.integers() | st.integers(0, 9) | st.floats() | st.booleans() | st.none()
VALUES = st.recursive(
    NUMBERS | TOKENS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TOKENS, inner, max_size=4),
    max_leaves=12,
)
IDS = st.dictionaries(TOKENS, st.integers(0, 12) | NUMBERS, max_size=8)
ADDED = st.fixed_dictionaries(
    {}, optional={"id": NUMBERS, "content": TOKENS | NUMBERS, "special": NUMBERS}
)
CONTENTS = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.builds(
        lambda seed, at, cut, put: seed[: at % len(seed)] + put + seed[at % len(seed) + cut :],
        st.sampled_from([seed.encode() for seed in SEEDS]),
        st.integers(0, 300),
        st.integers(0, 9),
        st.binary(max_size=5),
    ),
    st.one_of(
        VALUES,
        IDS,
        st.fixed_dictionaries(
            {"model": st.fixed_dictionaries({"vocab": IDS | VALUES}, optional={"type": VALUES})},
            optional={"added_tokens": st.lists(ADDED, max_size=3) | VALUES, "decoder": VALUES},
        ),
        st.fixed_dictionaries(
            {"added_tokens_decoder": st.dictionaries(TOKENS, ADDED, max_size=3) | VALUES},
            optional={"tokenizer_class": TOKENS, "pad_token": VALUES},
        ),
    ).map(lambda value: json.dumps(value).encode()),
)
FUZZ = settings(
    max_examples=200,
    deadline=2000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def check_sound(result: Vocabulary) -> None:
    assert len(result.tokens) == len(result.reasons) > 0
    for token, reason in zip(result.tokens, result.reasons, strict=True):
        assert token is not None or reason == "no_entry"
        (token or "").encode()


@FUZZ
@given(contents=st.dictionaries(st.sampled_from(FILES), CONTENTS, min_size=1, max_size=3))
def test_any_folder_is_read_or_refused(tmp_path: Path, contents: dict[str, bytes]) -> None:
    """A vocabulary or a clear error, within 2 s and 200 MB."""
    for path in tmp_path.iterdir():
        path.unlink()
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in (tmp_path, *(tmp_path / name for name in contents)):
        with suppress(MltfrError):
            check_sound(read_vocabulary(path))
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


@FUZZ
@given(
    tokens=st.lists(TOKENS | NUMBERS, max_size=6) | st.lists(TOKENS, max_size=6),
    types=st.none() | st.lists(st.integers(0, 7) | NUMBERS, max_size=6),
    model=st.sampled_from(["gpt2", "llama", "bert", "rwkv", "x"]),
)
def test_any_ggml_vocabulary_is_read_or_refused(
    tokens: list[str], types: list[int] | None, model: str
) -> None:
    with suppress(MltfrError):
        check_sound(from_ggml(tokens, types, model, "x.gguf"))


def test_the_largest_gap_allowed_takes_little(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"the": 0, "of": (1 << 20) + 7}))
    tracemalloc.start()
    try:
        check_sound(find_vocabulary(tmp_path))
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
    finally:
        tracemalloc.stop()


def test_a_damaged_sentencepiece_model(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat"] * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    whole = path.read_bytes()
    assert find_vocabulary(tmp_path).kind.startswith("SentencePiece")
    path.write_bytes(whole.replace(b"</s>", b"</s\xc2", 1))
    with pytest.raises(DataError, match="is no whole SentencePiece model"):
        read_vocabulary(path)
    for cut in (7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="cannot be read"):
            read_vocabulary(path)
