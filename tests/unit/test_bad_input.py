"""Bad input, through the real commands: one paragraph with its remedy, exit code 2, nothing written
or lost.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import REPOSITORY, run_ranks, tiny_config, write_data

import train
from mltfr_dist.cli import main as mltfr
from mltfr_dist.config import RunConfig
from mltfr_dist.distributed import checkpoint
from mltfr_dist.errors import EXIT_BAD_INPUT
from mltfr_dist.training.run_folder import dump_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, tables and the finished run `tiny`, trained by the real command."""
    folder = tmp_path_factory.mktemp("finished")
    config = tiny_config(folder, training__epochs=1, training__consensus_epochs=1)
    assert train.main(["--config", str(written(folder, config))]) == 0
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    config = copy / "runs" / "tiny" / "config.yaml"
    config.write_text(config.read_text().replace(str(finished), str(copy)))
    return copy


def written(folder: Path, config: RunConfig) -> Path:
    path = folder / f"{config.name}.yaml"
    path.write_text(dump_config(config))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def refused(folder: Path, capsys: pytest.CaptureFixture[str], command: Callable[[], int]) -> str:
    """Run a command that must be refused; returns its message."""
    before = contents(folder)
    capsys.readouterr()
    assert command() == EXIT_BAD_INPUT
    message = capsys.readouterr().err.strip()
    assert message
    assert "\n" not in message, "an error is one paragraph"
    assert "Traceback" not in message
    assert contents(folder) == before, "something was written or lost"
    return message


def train_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str = "new", **changes: object
) -> str:
    config = tiny_config(folder, name=name, **changes)
    path = written(folder, config)
    return refused(folder, capsys, lambda: train.main(["--config", str(path)]))


@pytest.mark.parametrize(
    ("content", "arguments", "expected"),
    [
        (None, [], ["in.csv", "in.csv"]),
        ("user_id,item_id\nu,i\n", [], ["timestamp", "column"]),
        ("user_id,item_id,timestamp\nu,i,1\nu,j\n", [], ["3"]),
        ("user_id,item_id,timestamp\nu,i,1\nu,j,soon\n", [], ["line 3", "soon"]),
        ("user_id,item_id,timestamp\nu,i,1\nv,j,2\n", [], ["core"]),
        ("user_id,item_id,timestamp\nu,i,1\n", ["--user-core", "zero"], ["`--user-core`", "zero"]),
    ],
    ids=[
        "missing file",
        "missing column",
        "short row",
        "unparsable row",
        "empty after k-core",
        "wrong option",
    ],
)
def test_prepare(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    arguments: list[str],
    expected: list[str],
) -> None:
    if content is not None:
        (tmp_path / "in.csv").write_text(content)
    command = ["prepare", str(tmp_path / "in.csv"), str(tmp_path / "out"), *arguments]
    message = refused(tmp_path, capsys, lambda: mltfr(command))
    for block in expected:
        assert block in message, message
    assert not (tmp_path / "out").exists()


def test_recommend_with_an_unknown_item(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(folder / "runs" / "tiny")
    message = refused(
        folder, capsys, lambda: mltfr(["recommend", run, "--history", "i1,i999", "--k", "3"])
    )
    assert "i999" in message
    assert "items.parquet" in message


def test_recommend_and_evaluate_on_no_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["recommend", str(folder), "--history", "i1"],
        ["evaluate", str(folder / "nowhere")],
    ):
        message = refused(folder, capsys, lambda command=command: mltfr(command))
        assert "holds no run" in message
    assert "there is no such folder" in message


def test_damaged_shard(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = folder / "data" / "train-000001.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    message = train_refused(folder, capsys)
    assert "train-000001.tar" in message
    assert "sha256" in message


def test_table_whose_header_disagrees(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = folder / "tables" / "first" / "table.json"
    values = json.loads(header.read_text())
    header.write_text(json.dumps(values | {"dim": values["dim"] + 1}))
    assert "table.json was changed after it was written" in train_refused(folder, capsys)


def test_table_whose_vocabulary_disagrees(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vocabulary = folder / "tables" / "second" / "vocabulary.json"
    vocabulary.write_text(json.dumps(json.loads(vocabulary.read_text())[:-1]))
    assert "vocabulary.json" in train_refused(folder, capsys)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"train_batch_size": 64}, ["train_batch_size", "training.global_batch_size"]),
        ({"bf16": {"enabled": True}}, ["bf16", "training.precision"]),
        ({"zero_optimisation": {}}, ["zero_optimization"]),
        ({"zero_optimization": {"stage": 2, "reduce_buket_size": 1}}, ["reduce_bucket_size"]),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"devic": "cpu"}}},
            ["offload_param.devic", "device"],
        ),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, ["auto"]),
    ],
)
def test_deepspeed_file(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    content: dict[str, object],
    expected: list[str],
) -> None:
    file = folder / "mine.json"
    file.write_text(json.dumps(content))
    message = train_refused(folder, capsys, deepspeed=str(file))
    for block in (*expected, "mine.json"):
        assert block in message


def test_bf16_without_sharding(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zero0 = str(Path(train.__file__).parent / "ds_configs" / "zero0.json")
    assert "bf16" in train_refused(folder, capsys, deepspeed=zero0, training__precision="bf16")


def test_folder_of_a_different_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = train_refused(folder, capsys, name="tiny", training__seed=7)
    assert "training.seed is 0 there and 7 here" in message


def test_checkpoint_of_another_schema_version(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "runs" / "tiny"
    (run / "result.json").unlink()
    header = next((run / "checkpoints").glob("train-step*/state.json"))
    content = json.loads(header.read_text())
    header.write_text(json.dumps(content | {"schema_version": 99}))
    config = run / "config.yaml"
    message = refused(folder, capsys, lambda: train.main(["--config", str(config)]))
    assert "99" in message
    assert f"this program reads {content['schema_version']}" in message


def test_checkpoint_of_a_release_that_draws_dropout_otherwise(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "runs" / "tiny"
    for header in (run / "checkpoints").glob("*/state.json"):
        content = json.loads(header.read_text())
        assert content.pop("draws") == checkpoint.DRAWS
        header.write_text(json.dumps(content))
    config = str(run / "config.yaml")
    assert train.main(["--config", config]) == 0  # finished: nothing is drawn any more
    (run / "result.json").unlink()
    message = refused(folder, capsys, lambda: train.main(["--config", config]))
    assert "draws dropout otherwise" in message


def test_changed_inputs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = folder / "data" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    message = refused(folder, capsys, lambda: mltfr(["evaluate", str(folder / "runs" / "tiny")]))
    assert "data changed" in message


def test_filter_that_keeps_more_than_it_searches(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"mltfr__filter__top_k": None, "mltfr__filter__filter_ratio": 0.9}
    assert "81 tokens of table `first`, of which 40 rows are searched" in train_refused(
        folder, capsys, **changes
    )


def test_filter_that_keeps_more_than_there_is(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    too_many: dict[str, object] = {
        "mltfr__filter__top_k": 71,
        "mltfr__filter__shortlist_size": None,
    }
    for strategy in ("user_guided", "random_tokens"):
        text = train_refused(folder, capsys, **too_many, mltfr__filter__strategy=strategy)
        assert "71 tokens of table `second`, of which 70 rows are searched" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mltfr__consensus__group": ["frist"]},
            "names `frist`, which is no table of the run; the nearest is `first`",
        ),
        ({"published__unaligned_experts": True}, "first 12 wide, 4 kept, second 20 wide, 4 kept"),
        (
            {"published__pooled_memory": True, "training__micro_batch_size": 8},
            "with 4 micro-batch(es) a step",
        ),
        (
            {
                "published__trained_tables": True,
                "deepspeed": str(REPOSITORY / "ds_configs" / "zero3.json"),
            },
            "published.trained_tables=true under ZeRO stage 3",
        ),
    ],
)
def test_mixtures_that_cannot_be(
    folder: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], message: str
) -> None:
    assert message in train_refused(folder, capsys, **changes)


def test_titles_that_the_data_does_not_have(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    untitled = folder / "untitled"
    sequences = folder / "interactions.txt"
    assert (
        mltfr(
            [
                "prepare",
                str(sequences),
                str(untitled),
                "--format",
                "sequences",
                "--item-core",
                "1",
                "--user-core",
                "1",
            ]
        )
        == 0
    )
    config = tiny_config(
        folder, name="grounded", data__path=str(untitled), mltfr__item_tokens__source="titles"
    )
    path = written(folder, config)
    message = refused(folder, capsys, lambda: train.main(["--config", str(path)]))
    assert "mltfr.item_tokens.source=titles" in message
    assert "--titles" in message


def test_batch_that_cannot_be_divided(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "micro-batches of 5" in train_refused(folder, capsys, training__micro_batch_size=5)


def test_more_ranks_than_sequences(tmp_path: Path) -> None:
    """Two real ranks, one training sequence: one message, from one rank, which the launcher ends
    with once more.
    """
    (tmp_path / "in.txt").write_text("u a b c d e\n")
    options = ["--format", "sequences", "--user-core", "1", "--item-core", "1"]
    assert mltfr(["prepare", str(tmp_path / "in.txt"), str(tmp_path / "single"), *options]) == 0
    config = tiny_config(tmp_path, data__path=str(tmp_path / "single"))
    path = written(tmp_path, config)
    with pytest.raises(AssertionError) as failure:
        run_ranks(2, Path(train.__file__), "--config", str(path))
    output = str(failure.value)
    assert output.count("There are 2 ranks and 1 training sequences") == 2
    assert "exitcode  : 2" in output
    assert not (tmp_path / "runs").exists()


def test_evaluate_and_recommend_repeat_the_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "runs" / "tiny"
    reported = json.loads((run / "result.json").read_text())
    capsys.readouterr()
    for split in ("valid", "test"):
        assert mltfr(["evaluate", str(run), "--split", split]) == 0
        assert json.loads(capsys.readouterr().out) == reported[split]
    assert mltfr(["recommend", str(run), "--history", "i1,i2,i3", "--k", "4", "--explain"]) == 0
    text = capsys.readouterr().out
    listed = [line.split()[2] for line in text.splitlines() if line.strip()[:1].isdigit()]
    assert len(listed) == 4
    assert not set(listed) & {"i1", "i2", "i3"}, "items of the history are left out"
    assert "first-" in text
    assert "gate" in text


def test_recommend_says_that_nothing_or_little_is_left(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(folder / "runs" / "tiny")
    items = [f"i{i}" for i in range(40)]
    for seen, listed, words in (
        (items, 0, "Nothing is left"),
        (items[1:], 1, "This one is left"),
        (items[3:], 3, "These 3 are left"),
        (items[4:], 4, ""),
    ):
        assert mltfr(["recommend", run, "--history", ",".join(seen), "--k", "4"]) == 0
        text = capsys.readouterr().out
        assert len([t for t in text.splitlines() if t.strip()[:1].isdigit()]) == listed
        assert words in text
        assert ("`--keep-seen`" in text) == bool(words)
    every = ",".join(items)
    assert mltfr(["recommend", run, "--history", every, "--k", "4", "--keep-seen"]) == 0
    assert "left" not in capsys.readouterr().out


def test_a_long_history_is_not_echoed_whole(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(folder / "runs" / "tiny")
    history = ",".join(["i1", "i2", "i3"] * 200)
    assert mltfr(["recommend", run, "--history", history, "--k", "2"]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("After 600 items, of which the model reads the last 10: ... -> ")
    assert line.count("->") == 10
    assert line.endswith("first-3 second-3")
    unknown = ",".join(f"x{i}" for i in range(300))
    message = refused(folder, capsys, lambda: mltfr(["recommend", run, "--history", unknown]))
    assert "x9 and 290 more" in message
    assert "x10" not in message


def test_a_grounded_run_says_that_it_reads_text_and_is_used_like_any(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"name": "grounded", "mltfr__item_tokens__source": "titles"}
    config = tiny_config(folder, training__epochs=1, training__consensus_epochs=1, **changes)
    assert train.main(["--config", str(written(folder, config))]) == 0
    assert "Items carry the tokens of their titles" in capsys.readouterr().out
    assert "outside the claim" in (config.folder / "report.md").read_text()
    assert "Items carry" not in (folder / "runs" / "tiny" / "report.md").read_text()
    assert mltfr(["evaluate", str(config.folder)]) == 0
    assert (
        json.loads(capsys.readouterr().out)
        == json.loads((config.folder / "result.json").read_text())["test"]
    )
    assert (
        mltfr(["recommend", str(config.folder), "--history", "i1,i5", "--k", "3", "--explain"]) == 0
    )
    assert "gate" in capsys.readouterr().out


def test_a_finished_run_is_only_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder / "runs" / "tiny"
    before = {k: v for k, v in contents(run).items() if k != "report.md"}
    capsys.readouterr()
    assert train.main(["--config", str(run / "config.yaml")]) == 0
    assert "finished before" in capsys.readouterr().out
    changing = ("report.md", "origin.json")  # this copy lies elsewhere than the run that was copied
    assert {k: v for k, v in contents(run).items() if k not in changing} == {
        k: v for k, v in before.items() if k not in changing
    }


def test_a_report_is_written_again_where_it_is_of_something_else(folder: Path) -> None:
    run = folder / "runs" / "tiny"
    again = ["--config", str(run / "config.yaml")]
    assert train.main(again) == 0
    report = run / "report.md"
    report.write_text(report.read_text() + "A note.\n")
    assert train.main(again) == 0
    assert report.read_text().endswith("A note.\n"), "nothing is new: it stays as it is"
    for name in ("result.json", "ranks.parquet"):  # `evaluate --save-ranks` writes the second
        time.sleep(0.05)  # a file system's clock may tick that seldom
        (run / name).touch()
        assert train.main(again) == 0
        assert not report.read_text().endswith("A note.\n"), f"{name} is newer"
        report.write_text(report.read_text() + "A note.\n")
    report.unlink()
    assert train.main(again) == 0
    assert report.exists()
    assert "log_every_steps: 7" not in report.read_text()
    assert train.main([*again, "training.log_every_steps=7"]) == 0
    assert "log_every_steps: 7" in report.read_text(), "the configuration is another"


# --- data that was changed after training
# --------------------------------------------------------------------------


def shift_titles(data: Path) -> None:
    """What somebody does who sorts the file: every title moves to the next item."""
    table = pq.read_table(data / "items.parquet")
    titles = table["title"].to_pylist()
    shifted = table.set_column(2, "title", pa.array([*titles[1:], titles[0]]))
    pq.write_table(shifted, data / "items.parquet")


def spoil_users(data: Path) -> None:
    table = pq.read_table(data / "users.parquet")
    pq.write_table(
        table.set_column(1, "user_id", table["user_id"].take([0] * len(table))),
        data / "users.parquet",
    )


def prepare_anew(data: Path) -> None:
    """Another preparation in the place of the one that was trained on."""
    other = write_data(data.parent / "other", seed=1)
    shutil.rmtree(data)
    other.rename(data)
    shutil.rmtree(data.parent / "other")


@pytest.mark.parametrize(
    "command", ["evaluate", "recommend", "export", "inspect", "train", "resume", "baselines"]
)
@pytest.mark.parametrize("change", [shift_titles, spoil_users])
def test_maps_that_changed_after_training(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    change: Callable[[Path], None],
) -> None:
    change(folder / "data")
    message = refused(folder, capsys, lambda: use(folder, command))
    assert f"{'items' if change is shift_titles else 'users'}.parquet is damaged" in message
    assert "last written on" in message


@pytest.mark.parametrize("command", ["evaluate", "recommend", "export", "resume"])
def test_data_that_was_prepared_anew_after_training(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    prepare_anew(folder / "data")
    message = refused(folder, capsys, lambda: use(folder, command))
    assert "was made from other inputs; since it began on 20" in message
    assert "data changed (sha256 " in message


@pytest.mark.parametrize("command", ["evaluate", "recommend", "export", "resume"])
@pytest.mark.parametrize("content", [None, "", "[]", '{"data": '])
def test_a_run_without_its_record(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str, content: str | None
) -> None:
    record = folder / "runs" / "tiny" / "inputs.json"
    record.unlink() if content is None else record.write_text(content)
    message = refused(folder, capsys, lambda: use(folder, command))
    assert "cannot be compared with its inputs" in message
    assert "inputs.json" in message


def use(folder: Path, command: str) -> int:
    """A command that reads the data of the run `tiny`."""
    run = folder / "runs" / "tiny"
    if command in ("train", "baselines"):
        changes = {"training__epochs": 1, "training__consensus_epochs": 1}
        if command == "baselines":
            changes["baselines"] = ["popularity", "item_knn"]
        config = written(folder.parent, tiny_config(folder, name="new", **changes))
        return train.main(["--config", str(config)])
    if command == "resume":
        return train.main(["--config", str(run / "config.yaml")])
    arguments = {
        "evaluate": [str(run)],
        "recommend": [str(run), "--history", "i1,i2"],
        "export": [str(run), str(folder / "model")],
        "inspect": [str(folder / "data")],
    }[command]
    return mltfr([command, *arguments])
