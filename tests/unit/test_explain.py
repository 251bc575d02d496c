"""`mltfr explain`: what is left out changes what it should, and the page is whole, escaped and
alone.
"""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from support import tiny_config, write_data
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mltfr_dist
from mltfr_dist.cli import main as mltfr
from mltfr_dist.config import RunConfig
from mltfr_dist.errors import EXIT_BAD_INPUT
from mltfr_dist.models.folded import shallow
from mltfr_dist.ranking import Ranker, score_histories
from mltfr_dist.serving.ablation import answer, gates, without_table
from mltfr_dist.serving.texts import Texts
from mltfr_dist.training.using.explain_page import Explained, page
from mltfr_dist.training.using.explain_run import validation_histories

HISTORY = ["i1", "i2", "i3", "i4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("explain")


@pytest.fixture(scope="module")
def config(folder: Path) -> RunConfig:
    made = tiny_config(folder, training__epochs=1, training__consensus_epochs=1)
    mltfr_dist.fit(made)
    return made


@pytest.fixture(scope="module")
def rec(config: RunConfig) -> Ranker:
    return mltfr_dist.load(config.folder)


def test_without_all_tables_the_backbone_is_left(rec: Ranker) -> None:
    item_ids = torch.tensor([rec.items.encode(HISTORY)])
    bare = shallow(rec.model)
    bare.mltfr = None
    expected = score_histories(bare, item_ids)
    one = without_table(rec.serving, 0)
    assert not torch.equal(score_histories(one, item_ids), score_histories(rec.model, item_ids))
    assert not torch.allclose(score_histories(one, item_ids), expected)
    none = without_table(one, 1)
    assert torch.allclose(score_histories(none, item_ids), expected, atol=1e-6)
    assert score_histories(rec.serving, item_ids).equal(score_histories(rec.model, item_ids))


def test_an_answer_counts_what_changes(rec: Ranker) -> None:
    result = answer(rec, "one", HISTORY, 3)
    assert result.best == rec.recommend(HISTORY, k=10)
    assert [effect.what for effect in result.tables] == ["first", "second"]
    assert [effect.what for effect in result.items] == [
        rec.items.name(number) for number in rec.items.find(HISTORY[1:])
    ]
    rest = [*HISTORY[:3]]
    ids = {item.item_id for item in result.best}
    others = {item.item_id for item in rec.recommend(rest, k=10, exclude=HISTORY)}
    assert result.items[-1].stay == len(ids & others)
    assert len(result.items[-1].entered) == 10 - len(ids & others)
    order = [item.item_id for item in result.best]
    change = rec.score([rest], order) - rec.score([HISTORY], order)
    assert result.items[-1].shift == pytest.approx(float(abs(change).mean()))
    by_position = gates(rec, HISTORY)
    assert len(by_position) == 4
    assert by_position[-1] == pytest.approx([view.gate_weight for view in result.views], abs=1e-5)
    assert all(sum(weights) == pytest.approx(1, abs=1e-5) for weights in by_position)


def test_a_longer_history_lets_an_older_item_in(rec: Ranker) -> None:
    longer = [f"i{n}" for n in range(13)]  # the model reads 10
    result = answer(rec, "one", longer, 2)
    assert result.history == [rec.items.name(number) for number in rec.items.find(longer[3:])]
    assert len(result.gates) == 10
    order = [item.item_id for item in result.best]
    assert not set(order) & set(longer)
    change = rec.score([longer[2:-1]], order) - rec.score([longer[3:]], order)
    assert len(longer[2:-1]) == rec.max_len
    assert result.items[-1].shift == pytest.approx(float(abs(change).mean()))


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_command_writes_a_page_and_texts(
    config: RunConfig, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_config(
        folder,
        name="random",
        training__epochs=1,
        mltfr__consensus__enabled=False,
        mltfr__table_content="random",
    )
    mltfr_dist.fit(other)
    arguments = ["explain", str(config.folder), "--users", "2"]
    assert mltfr([*arguments, "--control", str(other.folder)]) == 0
    assert "explain.html: open it in a browser" in capsys.readouterr().out
    text = (config.folder / "explain.html").read_text()
    parser = Tags()
    parser.feed(text)
    assert parser.open == []
    assert not {name for name, _ in parser.attributes} & {"src", "href"}, "it loads nothing"
    assert not re.search(r"https?:|<script|@import|url\(", text)
    assert text.count("<h3>validation user") == 2
    assert "random (control: random)" in text
    for name in ("head", "middle", "tail", "first", "second"):
        assert name in text
    board = EventAccumulator(str(config.folder / "tb" / "explain")).Reload()
    tags = board.Tags()["tensors"]
    assert {"explain/user_1/text_summary", "explain/items_head/text_summary"} <= set(tags)
    assert mltfr([*arguments[:-1], "1"]) == 0
    assert len(list((config.folder / "tb" / "explain").iterdir())) == 1, "earlier texts are gone"
    tags = EventAccumulator(str(config.folder / "tb" / "explain")).Reload().Tags()["tensors"]
    assert "explain/user_0/text_summary" in tags
    assert "explain/user_1/text_summary" not in tags


def test_names_are_escaped(config: RunConfig) -> None:
    rec = mltfr_dist.load(config.folder)
    evil = "<script>alert('x')</script> & \"more\""
    titles = Texts.of(pa.chunked_array([[None, *[evil] * rec.items.num_items]], pa.string()))
    rec = replace(rec, items=replace(rec.items, titles=titles))
    history = validation_histories(rec, 1)[0]  # type: ignore[arg-type]
    explained = Explained(
        rec, [answer(rec, evil, history, 2)], [], {evil: {"HR@10": 0.1, "NDCG@10": 0.1}}
    )  # type: ignore[arg-type]
    text = page(explained)
    assert "<script" not in text
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; &quot;more&quot;" in text


def test_a_bare_backbone_and_bad_use(
    config: RunConfig, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tiny_config(folder, name="bare", training__epochs=1, mltfr__enabled=False)
    mltfr_dist.fit(bare)
    page_file = folder / "bare.html"
    assert mltfr(["explain", str(bare.folder), "--output", str(page_file), "--users", "1"]) == 0
    text = page_file.read_text()
    assert "bare: there are no tables" in text
    assert "Without an item of the history" in text
    capsys.readouterr()
    assert mltfr(["explain", str(bare.folder), "--users", "0"]) == EXIT_BAD_INPUT
    assert "--users is 0" in capsys.readouterr().err
    data = write_data(folder / "elsewhere", num_users=60, seed=3)
    changes = {"name": "elsewhere", "data__path": str(data), "training__epochs": 1}
    elsewhere = tiny_config(folder, **changes, mltfr__enabled=False)
    mltfr_dist.fit(elsewhere)
    command = ["explain", str(config.folder), "--control", str(elsewhere.folder)]
    assert mltfr(command) == EXIT_BAD_INPUT
    assert "were trained on other data" in capsys.readouterr().err


OUTPUTS = {
    "a folder": ("taken.html", "taken.html cannot be written"),
    "below a file": ("file/page.html", "page.html cannot be written"),
    "another ending": ("config.yaml", "config.yaml does not end in .html. Name a page"),
}


@pytest.mark.parametrize("wrong", OUTPUTS)
def test_a_page_that_cannot_be_written(
    config: RunConfig, tmp_path: Path, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output, words = OUTPUTS[wrong]
    (tmp_path / "taken.html").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "config.yaml").write_text("mine")
    before = set(tmp_path.rglob("*"))
    command = ["explain", str(config.folder), "--users", "1", "--output", str(tmp_path / output)]
    assert mltfr(command) == EXIT_BAD_INPUT
    assert words in capsys.readouterr().err
    assert set(tmp_path.rglob("*")) == before
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_a_page_goes_into_a_new_folder(config: RunConfig, tmp_path: Path) -> None:
    page_file = tmp_path / "new" / "pages" / "page.html"
    assert mltfr(["explain", str(config.folder), "--users", "1", "--output", str(page_file)]) == 0
    assert "Sample users" in page_file.read_text()


def test_an_export_is_no_run(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mltfr_dist.export(config.folder, tmp_path / "model")
    assert mltfr(["explain", str(tmp_path / "model")]) == EXIT_BAD_INPUT
    words = capsys.readouterr().err
    assert "is that of an exported model. Name the run that it was exported from" in words
