"""The package as a library: its names, what it refuses, and a process that goes on after a run."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import REPOSITORY, clean_environment, run_ranks, tiny_config, write_data

import mltfr_dist
from mltfr_dist import (
    RunConfig,
    build_table,
    export,
    fit,
    load,
    load_exported,
    load_run,
    prepare,
    preset,
    push_to_hub,
)
from mltfr_dist.distributed.guest import leave_group
from mltfr_dist.distributed.meeting import stop_ranks
from mltfr_dist.errors import CheckpointError, ConfigError, DataError, MltfrError, StoppedError
from mltfr_dist.library.words import as_call
from mltfr_dist.presets import PRESETS
from mltfr_dist.schema import changed
from mltfr_dist.training.run_folder import dump_config
from mltfr_dist.training.running.fit import fit as train

BRIEF = {"training.epochs": 1, "training.consensus_epochs": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("library")


@pytest.fixture(scope="module")
def config(folder: Path) -> RunConfig:
    return tiny_config(folder, training__epochs=1, training__consensus_epochs=1)


@pytest.fixture(scope="module")
def fitted(config: RunConfig) -> Any:
    return fit(config, {"name": "fitted", "baselines": ["popularity"]})


# --- names


def test_every_name_is_there_documented_and_listed() -> None:
    assert set(mltfr_dist.__all__) <= set(dir(mltfr_dist))
    for name in mltfr_dist.__all__:
        assert getattr(mltfr_dist, name).__doc__, name
    assert set(mltfr_dist.__all__) - {"__version__"} == set(mltfr_dist._ROOMS)
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        _ = mltfr_dist.fitt  # type: ignore[attr-defined]


FREE_OF_TORCH = """
import sys
from mltfr_dist import RunConfig, fit, load_exported, load_run, prepare, preset
preset("demo", {"training.epochs": 2})
assert "torch" not in sys.modules
assert "deepspeed" not in sys.modules
assert "pandas" not in sys.modules
"""


def test_names_cost_no_torch_until_it_is_needed() -> None:
    command = [sys.executable, "-c", FREE_OF_TORCH]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


USER_FILE = """
from pathlib import Path
from mltfr_dist import RunConfig, build_table, export, fit, load_exported, load_run, prepare, preset

manifest = prepare("events.csv", Path("data/mine"), user_core=2)
users: int = manifest.num_users
dim: int = build_table("model.gguf", name="mine").dim
config: RunConfig = preset("demo", {"data.path": Path("data/mine")})
run = fit(config, resume=False)
ndcg: float = run.test["NDCG@10"]
titles: list[str | None] = [found.title for found in run.load().recommend(["a", 7], k=3)]
export(run.folder, "model")
for model in (load_run("runs/demo"), load_exported("model")):
    best: list[str] = [found.item_id for found in model.recommend(["a"])]
    reveal_type(model.recommend(["a"], k=3))
    reveal_type(model.recommend([["a"], [7]]))
fit(3)
"""


@pytest.mark.slow  # mypy reads the whole package
@pytest.mark.timeout(900)
def test_types_are_seen_by_a_strict_checker(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER_FILE)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "user.py"]
    environment = clean_environment(MYPYPATH=str(REPOSITORY))
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=800
    )
    own = [line for line in done.stdout.splitlines() if line.startswith("user.py")]
    revealed = "\n".join(own)
    assert "list[mltfr_dist.serving.results.Recommendation]" in revealed
    assert "mltfr_dist.serving.results.Recommendations" in revealed
    errors = [line for line in own if ": error:" in line]
    assert len(errors) == 1, done.stdout
    assert '"fit" has incompatible type "int"' in errors[0]


# --- a process that goes on


def state() -> dict[str, object]:
    return {
        "environment": dict(os.environ),
        "group": torch.distributed.is_initialized(),
        "threads": torch.get_num_threads(),
        "handlers": [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)],
        "watchdogs": [t.name for t in threading.enumerate() if t.name == "watchdog"],
    }


@pytest.fixture
def own_process() -> Iterator[None]:
    """No process group of tests before."""
    leave_group()
    yield
    stop_ranks()


@pytest.mark.usefixtures("own_process")
def test_runs_follow_each_other_and_leave_nothing_behind(config: RunConfig) -> None:
    def handler(*_: object) -> None:
        raise AssertionError("no signal was sent")

    before_test = signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(2)
    try:
        before = state()
        first = fit(config, {"name": "first"})
        assert state() == before
        with pytest.raises(ConfigError, match="already holds a different run"):
            fit(config, {"name": "first", "training.seed": 1})
        assert state() == before
        zero3 = {"name": "third", "deepspeed": REPOSITORY / "ds_configs" / "zero3.json"}
        for overrides in ({"name": "second"}, zero3):
            again = fit(config, overrides)
            assert state() == before
            assert again.test.keys() == first.test.keys()
            for metric, value in first.valid.items():
                assert again.valid[metric] == pytest.approx(value, abs=0.05), overrides
        assert again.folder == config.runs_dir / "third"
        assert fit(config, {"name": "second"}).test == first.test, "the same run, reported again"
        assert fit(config, {"name": "second"}).test == first.test
    finally:
        torch.set_num_threads(1)
        signal.signal(signal.SIGTERM, before_test)


@pytest.mark.usefixtures("own_process")
def test_a_stopped_run_raises_goes_on_and_gives_signals_back(config: RunConfig) -> None:
    overrides = {"name": "stopped", "training.epochs": 200, "training.patience": 200}
    timer = threading.Timer(4.0, os.kill, (os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    timer.start()
    try:
        with pytest.raises(StoppedError):
            fit(config, overrides)
    finally:
        timer.cancel()
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(CheckpointError, match=r"not finished.*`fit\('.*config\.yaml'\)`"):
        load_run(config.runs_dir / "stopped")
    with pytest.raises(ConfigError, match=r"already holds this run.*`resume=True`"):
        fit(config, overrides, resume=False)


@pytest.mark.usefixtures("own_process")
def test_it_runs_in_a_thread(config: RunConfig) -> None:
    result: list[object] = []
    thread = threading.Thread(target=lambda: result.append(fit(config, {"name": "threaded"}).test))
    thread.start()
    thread.join()
    assert len(result) == 1
    assert result[0]


def test_a_group_that_is_there_is_used_and_stays(config: RunConfig) -> None:
    train(tiny_config(config.runs_dir.parent, name="before", training__epochs=1))
    assert torch.distributed.is_initialized()
    fit(config, {"name": "guest"})
    assert torch.distributed.is_initialized()
    stop_ranks()


# --- configurations


def test_the_forms_of_a_configuration(config: RunConfig, folder: Path, fitted: Any) -> None:
    overrides = {"name": "fitted", "baselines": ["popularity"]}
    file = folder / "tiny.yaml"
    file.write_text(dump_config(config))
    for form in (config, file, str(file), config.model_dump(mode="json")):
        again = fit(form, overrides)
        assert again.config == fitted.config
        assert again.test == fitted.test
    assert [result.name for result in fitted.results] == ["popularity", "sasrec + MLTFR"]
    assert fitted.folder == folder / "runs" / "fitted"
    assert fitted.report.startswith("#")
    assert fitted.valid["NDCG@10"] > 0
    assert fit(fitted.folder / "config.yaml").test == fitted.test


def test_overrides_are_dotted_or_nested() -> None:
    changed = preset("smoke", {"training.epochs": 3, "data": {"path": Path("here"), "max_len": 7}})
    assert (changed.training.epochs, changed.data.max_len) == (3, 7)
    assert changed.data.path == Path("here")
    assert changed.training.global_batch_size == preset("smoke").training.global_batch_size
    sections = preset("smoke", {"training": changed.training})
    assert sections.training == changed.training
    assert {name: preset(name) for name in PRESETS} == {name: PRESETS[name]() for name in PRESETS}


BAD_CONFIGURATIONS = {
    "no preset": (lambda: preset("demoo"), "no preset `demoo`; the nearest is `demo`"),
    "no name": (lambda: preset(3), "name is 3, of type int"),  # type: ignore[arg-type]
    "unknown key": (
        lambda: preset("demo", {"training.epoch": 3}),
        "`training.epoch` is not a field; the nearest is `training.epochs`",
    ),
    "unknown section": (lambda: preset("demo", {"trainig.epochs": 3}), "`trainig` is not a field"),
    "wrong value": (lambda: preset("demo", {"training.epochs": -3}), "training.epochs.*-3"),
    "true for a number": (lambda: preset("demo", {"training.epochs": True}), "epochs must not be"),
    "no mapping": (
        lambda: preset("demo", ["training.epochs=3"]),  # type: ignore[arg-type]
        "overrides are of type list",
    ),
    "fit: no preset": (lambda: fit("demoo"), "`demoo` is neither a preset nor a YAML file.*`demo`"),
    "fit: no file": (lambda: fit("mine.yaml"), "mine.yaml cannot be read"),
    "fit: a number": (lambda: fit(3), "config is 3, of type int"),  # type: ignore[arg-type]
    "fit: nothing": (lambda: fit({}), "`data` is required"),
    "fit: wrong key": (lambda: fit({"data": {"pth": "x"}}), "`data.pth` is not a field"),
}


@pytest.mark.parametrize("wrong", BAD_CONFIGURATIONS)
def test_bad_configurations(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call, words = BAD_CONFIGURATIONS[wrong]
    with pytest.raises(ConfigError, match=words):
        call()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_run_is_no_configuration(fitted: Any) -> None:
    with pytest.raises(ConfigError, match=r"the folder of a run \(.*config\.yaml\).*give its"):
        fit(str(fitted.folder))


def test_data_that_is_not_there(config: RunConfig) -> None:
    with pytest.raises(DataError, match="`prepare`"):
        fit(config, {"name": "none", "data.path": "nowhere"})
    with pytest.raises(DataError, match="`build_table`"):
        fit(config, {"name": "none", "mltfr.tables": ["nowhere"]})
    assert not (config.runs_dir / "none").exists()


# --- models


def test_a_run_and_its_export_are_used_alike(fitted: Any, tmp_path: Path) -> None:
    run = load_run(str(fitted.folder))
    info = export(str(fitted.folder), str(tmp_path / "model"))
    exported = load_exported(str(tmp_path / "model"))
    assert exported.info == info
    histories: list[list[str | int]] = [["i1", "i2", "i3"], ["i9"], [f"i{n}" for n in range(15)]]
    assert torch.equal(run.scores(histories), exported.scores(histories))
    assert run.item_ids == exported.item_ids
    for history in histories:
        for keep_seen in (False, True):
            best = run.recommend(history, 5, filter_seen=not keep_seen)
            assert best == exported.recommend(history, 5, filter_seen=not keep_seen)
            assert [r.score for r in best] == sorted((r.score for r in best), reverse=True)
            assert keep_seen or not {r.item_id for r in best} & set(history)
            for result in best:
                number = result.item_id[1:]
                titled = f"first-{number} second-{int(number) % 7}"
                assert result.title == (None if number == "5" else titled)
    everything = run.recommend(["i1"], 40)
    assert len(everything) == 39
    assert len(run.recommend(["i1"], 40, filter_seen=False)) == 40
    column, one = run.scores([["i1"]])[0], run.item_ids.index("i1")
    largest = max(column[i].item() for i in range(1, 41) if i != one)
    assert everything[0].score == pytest.approx(largest, rel=1e-6)
    assert run.evaluate() == fitted.test
    assert run.evaluate("valid") == fitted.valid
    assert fitted.load().recommend(["i1"], 3) == everything[:3]


WITHOUT_DEEPSPEED = """
import importlib.abc, sys

class Refused(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("deepspeed", "duckdb", "pandas", "ray"):
            raise ImportError(f"{name} is refused here")

sys.meta_path.insert(0, Refused())
from mltfr_dist import load_exported
print(*(found.item_id for found in load_exported(sys.argv[1]).recommend(["i1", "i2"], 5)))
"""


def test_an_export_needs_little(fitted: Any, tmp_path: Path) -> None:
    export(fitted.folder, tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DEEPSPEED, str(tmp_path / "model")],
        env=clean_environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    best = load_run(fitted.folder).recommend(["i1", "i2"], 5)
    assert done.stdout.split() == [result.item_id for result in best]


ON_RANKS = """
import sys
from mltfr_dist import fit
for name in ("first", "second"):
    run = fit(sys.argv[1], {"name": name})
    sys.stdout.write(f"{name} {run.test}\\n")  # one write: both ranks share a pipe
    sys.stdout.flush()
"""


def test_every_rank_of_a_launched_script_calls_it(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "train_mine.py").write_text(ON_RANKS)
    overrides = {"runs_dir": tmp_path / "runs", "name": "second"}
    (tmp_path / "mine.yaml").write_text(
        dump_config(changed(config, {"runs_dir": str(tmp_path / "runs")}, source="a test"))
    )
    out = run_ranks(2, tmp_path / "train_mine.py", str(tmp_path / "mine.yaml"))
    lines = [line for line in out.splitlines() if line.startswith(("first {", "second {"))]
    assert len(lines) == 4
    assert len({line.partition(" ")[2] for line in lines}) == 1, "equal on both ranks, and runs"
    assert str(load_run(tmp_path / "runs" / "second").evaluate()) in lines[-1]
    assert fit(config, overrides).results[-1].world_size == 2, "finished: only reported"


def test_ids_that_are_numbers(tmp_path: Path) -> None:
    rows = "".join(f"u{u},{(u + n) % 9},{1_600_000_000 + n}\n" for u in range(30) for n in range(5))
    (tmp_path / "events.csv").write_text("user_id,item_id,timestamp\n" + rows)
    prepare(tmp_path / "events.csv", tmp_path / "data", user_core=1, item_core=1)
    bare = {"data": {"path": tmp_path / "data"}, "mltfr.enabled": False, **BRIEF}
    backbone = {"backbone.hidden_dim": 8, "runs_dir": tmp_path / "runs", "training.threads": 1}
    run = fit(bare | backbone).load()
    best = run.recommend(["1", "2"], 3)
    for history in ([1, 2], np.array([1, 2]), (np.int32(1), "2")):
        assert run.recommend(history, 3) == best  # type: ignore[arg-type]
    assert best[0].title is None


BAD_USES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "unknown": (["i1", "i999"], {}, r"Unknown item id i999; the nearest is `i9`.*lists them"),
    "empty": ([], {}, "history is empty"),
    "a text": ("i1,i2", {}, "'i1,i2' is no list of ids"),
    "a number": (7, {}, "7 is no list of ids"),
    "a fraction": ([1.0], {}, "holds 1.0, of type float"),
    "nothing": ([None], {}, "of type NoneType"),
    "true": ([True], {}, "of type bool"),
    "k is 0": (["i1"], {"k": 0}, "k is 0; there are 40 items"),
    "k is large": (["i1"], {"k": 41}, "k is 41; there are 40 items"),
    "k is a text": (["i1"], {"k": "5"}, "k is '5'"),
    "k is true": (["i1"], {"k": True}, "k is True"),
}


@pytest.mark.parametrize("wrong", BAD_USES)
def test_bad_histories(wrong: str, fitted: Any, folder: Path) -> None:
    if not (folder / "exported").exists():
        export(fitted.folder, folder / "exported")
    history, options, words = BAD_USES[wrong]
    said = []
    for model in (load_run(fitted.folder), load_exported(folder / "exported")):
        with pytest.raises(DataError, match=words) as caught:
            model.recommend(history, **options)
        said.append(re.sub(r"\(\S+ lists", "(IT lists", str(caught.value)))
    assert said[0] == said[1]
    assert "--" not in said[0]


def test_bad_folders(fitted: Any, tmp_path: Path) -> None:
    run = load_run(fitted.folder)
    with pytest.raises(DataError, match="no histories"):
        run.scores([])
    with pytest.raises(ConfigError, match=r"no split `train` to evaluate on.*valid or test"):
        run.evaluate("train")
    with pytest.raises(CheckpointError, match="holds no run"):
        load_run(tmp_path)
    with pytest.raises(CheckpointError, match="holds no run"):
        export(tmp_path, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"no exported model.*with `export`"):
        load_exported(fitted.folder)
    with pytest.raises(ConfigError, match=r"exists.*never overwrites"):
        export(fitted.folder, tmp_path)
    with pytest.raises(CheckpointError, match="no exported model"):
        push_to_hub(fitted.folder, "name/model")
    export(fitted.folder, tmp_path / "model")
    said = r"model was not uploaded to `no name`: .*`owner/name`.*`hf auth login`"
    with pytest.raises(ConfigError, match=re.compile(said, re.DOTALL)):
        push_to_hub(tmp_path / "model", "no name")
    for call in (load_run, load_exported, load):
        with pytest.raises(ConfigError, match="folder is None, of type NoneType"):
            call(None)  # type: ignore[arg-type]


# --- inputs


BAD_INPUTS: dict[str, tuple[Any, type[MltfrError], str]] = {
    "option": (
        lambda out: prepare("a.csv", out, user_colum="u"),
        ConfigError,
        "no option `user_colum`; the nearest is `user_column`",
    ),
    "option of resources": (
        lambda out: prepare("a.csv", out, memorylimit="4GB"),
        ConfigError,
        "no option `memorylimit`; the nearest is `memory_limit`",
    ),
    "value": (
        lambda out: prepare("a.csv", out, user_core=0),
        ConfigError,
        "`user_core`: .*greater than or equal to 1",
    ),
    "source": (lambda out: prepare(7, out), ConfigError, "source is of type int"),
    "dictionary": (lambda out: prepare({"a": [1]}, out), DataError, "There is no file a"),
    "rows": (lambda out: prepare([("u", "i", 1)], out), ConfigError, r"pyarrow\.table\(source\)"),
    "nothing": (lambda out: prepare([], out), ConfigError, "source is of type list"),
    "bytes": (lambda out: prepare(b"a.csv", out), ConfigError, "source is of type bytes"),
    "no file": (lambda out: prepare("a.csv", out), DataError, "There is no file a.csv"),
    "output": (lambda out: prepare("a.csv", None), ConfigError, "output is None"),  # type: ignore[arg-type]
    "titles": (lambda out: prepare("a.csv", out, titles=7), ConfigError, "titles is 7"),
    "download": (
        lambda out: prepare("a.csv", out, download=True),
        ConfigError,
        "`download=True` is given for a.csv, which is no public set",
    ),
    "set": (
        lambda out: prepare("beauty", out),
        DataError,
        "Add `download=True` to fetch it",
    ),
    "table option": (
        lambda out: build_table("m", out, normalize="none"),
        ConfigError,
        "no option `normalize`; the nearest is `normalise`",
    ),
    "table source": (lambda out: build_table(None, out), ConfigError, "source is None"),  # type: ignore[arg-type]
    "table name": (
        lambda out: build_table("m", out, name="a/b"),
        ConfigError,
        "`name='a/b'` cannot be a table's name",
    ),
    "no table": (lambda out: build_table("./nothing", out), DataError, "nothing"),
}


@pytest.mark.parametrize("wrong", BAD_INPUTS)
def test_bad_inputs(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call, kind, words = BAD_INPUTS[wrong]
    with pytest.raises(kind, match=words):
        call(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "events.csv").write_text("user_id,item_id,timestamp\nu,i,1600000000\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="something other than prepared data"):
        prepare(tmp_path / "events.csv", str(tmp_path / "sub"))


def test_files_and_folders_may_be_texts_or_paths(tmp_path: Path) -> None:
    write_data(tmp_path)
    source = tmp_path / "interactions.txt"
    lines: list[str] = []
    options = {"format": "sequences", "user_core": 1, "item_core": 1, "log": lines.append}
    first = prepare(source, tmp_path / "a", titles=tmp_path / "titles.csv", **options)
    again = prepare(
        [str(source)], str(tmp_path / "b"), titles=str(tmp_path / "titles.csv"), **options
    )
    assert first == again
    assert lines


def test_a_table_is_built(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text(
        "4 3\nking 1 0 0\nqueen 0 1 0\nman 0 0 1\nwoman 1 1 1\n", encoding="utf-8"
    )
    info = build_table(tmp_path / "words.txt", tmp_path / "tables", name="words", log=str)
    assert (info.name, info.num_rows, info.dim) == ("words", 4, 3)
    with pytest.raises(DataError, match="another name with `name`"):
        build_table(
            tmp_path / "words.txt", tmp_path / "tables", name="words", normalise="none", log=str
        )


# --- words


@pytest.mark.parametrize(
    ("typed", "called"),
    [
        ("with --missing drop.", "with `missing='drop'`."),
        ("--null 'NA' --missing drop; or", "`null=('NA',)` `missing='drop'`; or"),
        ("Leave --no-header out, or --skip-rows 1.", "Leave `header=False` out, or `skip_rows=1`."),
        ("Name it with --user-column.", "Name it with `user_column`."),
        ("as in `--format csv`.", "as in `format='csv'`."),
        ("--delimiter ','", "`delimiter=','`"),
        ("Run `mltfr prepare` again.", "Run `prepare` again."),
        ("`mltfr prepare x y --download`", "`mltfr prepare x y --download`"),
        ("it: `mltfr train --config runs/a/config.yaml`.", "it: `fit('runs/a/config.yaml')`."),
        ("(`--num_gpus`)", "(`--num_gpus`)"),
    ],
)
def test_words_of_a_call(typed: str, called: str) -> None:
    assert as_call(typed) == called


def texts(path: Path) -> Iterator[str]:
    """The literals of a file that are no docstrings, with `value` in place of what is formatted."""
    tree = ast.parse(path.read_text())
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
        and isinstance(node.body[0], ast.Expr)
    }
    inner = {
        id(block)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for block in node.values
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(block.value) if isinstance(block, ast.Constant) else "value"
                for block in node.values
            )
        elif isinstance(node, ast.Constant) and id(node) not in docs | inner:
            yield str(node.value)


STAY = (
    "--value",
    "--neighbours",
    "--sets",
    "--target",
    "--num_gpus",
    "--local-dir",
    "--history",
    "--output D",
)
"""Of commands that are no functions here, or of other programs."""


def test_every_option_in_a_message_about_inputs_becomes_a_parameter() -> None:
    result, left = 0, []
    rooms = ("data/sources", "data/prepare", "data/shards", "data/stream", "tables")
    for path in (
        file for room in rooms for file in (REPOSITORY / "mltfr_dist" / room).glob("*.py")
    ):
        for text in texts(path):
            result += "--" in text
            outside = re.sub(r"`(?:mltfr|pip|hf|iconv|deepspeed)[^`]*`", "", as_call(text))
            if re.search(r"--[a-z]", outside) and not any(word in outside for word in STAY):
                left.append((path.name, outside))
    assert result > 60
    assert not left
