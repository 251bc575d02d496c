"""What TensorBoard shows of a run, read back from its files as TensorBoard reads them."""

from __future__ import annotations

import html
import importlib.util
import json
import math
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from safetensors.torch import load_file
from support import read_lines, tiny_config
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from tensorboard.util.tensor_util import make_ndarray
from torch.nn import functional as F

from mltfr_dist.config import RunConfig
from mltfr_dist.data.batch import RankingBatch
from mltfr_dist.data.shards.manifest import read_manifest, read_map
from mltfr_dist.distributed.meeting import stop_ranks
from mltfr_dist.distributed.ranks import ALONE
from mltfr_dist.distributed.resources import MatrixWork, Stopwatch, matrix_peak, memory_gib
from mltfr_dist.distributed.signals import forget_request, request_stop
from mltfr_dist.errors import ConfigError, StoppedError
from mltfr_dist.models.cross_entropy import full_cross_entropy
from mltfr_dist.models.kernels import attend, nearest, usable
from mltfr_dist.models.routing import Routing, routing_sums
from mltfr_dist.training.evaluating.rankers import ByModel, MeanLoss, excluded
from mltfr_dist.training.reporting import services
from mltfr_dist.training.reporting.hparams import SESSION, write_session
from mltfr_dist.training.reporting.markdown import block, code, plain
from mltfr_dist.training.reporting.outcome import show_outcome
from mltfr_dist.training.reporting.projector import field
from mltfr_dist.training.reporting.services import Service, check_services
from mltfr_dist.training.reporting.tracking import Tracker
from mltfr_dist.training.run_folder import load_result
from mltfr_dist.training.running.fit import fit


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run of two stages, whose projector has the seven most popular items."""
    config = tiny_config(
        tmp_path_factory.mktemp("board"),
        training__epochs=2,
        training__consensus_epochs=1,
        tracking__projector_items=7,
    )
    fit(config)
    stop_ranks()
    return config


def board(folder: Path, *blocks: str) -> EventAccumulator:
    """A run, loaded as TensorBoard loads it."""
    return EventAccumulator(str(folder.joinpath("tb", *blocks)), {"tensors": 0}).Reload()


def scalars(result: EventAccumulator) -> dict[str, list[tuple[int, float]]]:
    tags = sorted(result.PluginTagToContent("scalars"))
    return {
        t: [(e.step, make_ndarray(e.tensor_proto).item()) for e in result.Tensors(t)] for t in tags
    }


def texts(result: EventAccumulator, tag: str) -> list[tuple[int, str]]:
    events = result.Tensors(f"{tag}/text_summary")
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in events]


def as_shown(markdown: str) -> str:
    """The text that a browser shows of a Markdown text."""
    return html.unescape(re.sub(r"<[^>]*>", "", markdown_to_safe_html(markdown)))


# --- scalars
# ------------------------------------------------------------


def test_a_step_shows_its_time_work_and_memory(run: RunConfig) -> None:
    result = scalars(board(run.folder, "train"))
    phases = ("forward", "backward", "optimizer")
    steps = [s for s, _ in result["time/step"]]
    assert steps == list(range(2, 9)), "of each point but the first step's, which warms up"
    for i in range(len(steps)):
        blocks = [result[f"time/{phase}"][i][1] for phase in phases]
        assert min(blocks) > 0
        assert sum(blocks) <= result["time/step"][i][1]
        total = result["time/step"][i][1] + result["time/data"][i][1]
        sequences = 32 if i != 2 and i != 6 else 24  # 120 in batches of 32: the fourth has 24
        rate = result["speed/sequences_per_second"][i][1]
        assert rate == pytest.approx(sequences / total, rel=1e-4)
    shares = [share for _, share in result["speed/share_of_matrix_peak"]]
    assert 0 < min(shares) <= max(shares) < 1
    assert [s for s, _ in result["memory/resident_gib"]] == list(range(1, 9))
    assert result["memory/resident_gib"][-1][1] <= result["memory/peak_gib"][-1][1] + 0.01


def test_validation_loss_and_entropy_of_the_filters(run: RunConfig) -> None:
    result = scalars(board(run.folder, "train"))
    assert [step for step, _ in result["valid/loss"]] == [4, 8]
    assert result["valid/loss"][0][1] == pytest.approx(math.log(40), abs=0.5)
    assert result["valid/loss"][1][1] < result["valid/loss"][0][1]
    for name in ("first", "second"):
        entropy = [value for _, value in result[f"filter_entropy/{name}"]]
        assert len(entropy) == 8
        assert 0 < min(entropy) <= max(entropy) <= math.log(4) + 1e-5
        assert f"filter_shortlist_recall/{name}" in result
        assert f"gate_weight/{name}" in result


def test_timing_stays_out_of_metrics(run: RunConfig) -> None:
    keys = {key for line in read_lines(run.folder / "metrics.jsonl") for key in line}
    assert not {k for k in keys if k.startswith(("time/", "speed/", "memory/", "filter_entropy/"))}
    (test,) = (x for x in read_lines(run.folder / "metrics.jsonl") if x["kind"] == "test")
    assert test["stage"] == "consensus"
    assert test["step"] == 4


def test_the_stages_are_runs_of_their_own_on_one_axis(run: RunConfig) -> None:
    first, second = (scalars(board(run.folder, stage)) for stage in ("train", "consensus"))
    assert {value for _, value in first["run/stage"]} == {1.0}
    assert {value for _, value in second["run/stage"]} == {2.0}
    assert [step for step, _ in second["run/stage"]] == [9, 10, 11, 12]
    assert [step for step, _ in second["valid/NDCG@10"]] == [8, 12]
    ((step, text),) = texts(board(run.folder, "consensus"), "run/stage")
    assert step == 8
    assert as_shown(text) == "Stage 2 (consensus) begins after update 8."


def test_mean_loss_is_the_cross_entropy_over_all_items() -> None:
    draws = torch.Generator().manual_seed(0)
    hidden, vectors = (torch.randn(n, 4, generator=draws) for n in (5, 8))
    targets = torch.tensor([1, 8, 0, 3, 3])  # the third is padding
    empty = torch.zeros(0, dtype=torch.int64)
    loss = MeanLoss(ALONE)
    for rows in (slice(0, 2), slice(2, 5)):
        batch = RankingBatch(targets[rows, None], targets[rows], empty, empty)

        def model(_: RankingBatch, read: Any, rows: slice = rows) -> Any:
            return read(hidden[rows], vectors)

        places = ByModel(model, loss)(batch, excluded(batch, filter_seen=False))
        assert places.better.shape == targets[rows].shape
    real = targets > 0
    expected = F.cross_entropy(hidden[real] @ vectors.T, targets[real] - 1)
    assert loss.mean() == pytest.approx(float(expected), rel=1e-5)


def test_the_entropy_of_what_is_kept() -> None:
    gate = torch.full((3, 2), 0.5)
    of_each = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    of_all = torch.full((1, 6), 1 / 6)
    sums = routing_sums(Routing(gate, [of_each, of_all], 2))
    assert sums.kept_entropy.tolist() == pytest.approx([1.5 * math.log(2), 2 * math.log(6)])
    assert sums.num_queries.tolist() == [2]
    nothing = routing_sums(Routing(gate[:0], [of_each[:0], of_all], 0))
    assert nothing.kept_entropy.tolist() == [0.0, 0.0]


# --- going on
# ------------------------------------------------------------


def draw(folder: Path, stage: str, start: int | None, steps: list[int], base: int = 0) -> Tracker:
    tracker = Tracker(folder, active=True, stage=stage, step=start, base_step=base)
    tracker.open_with(tiny_config(folder))
    if start is None:
        tracker.log("valid", 0, {"NDCG@10": 0.5}, epoch=0)
    for step in steps:
        tracker.log("step", step, {"loss": 1.0 / step}, epoch=1)
        tracker.text("kept_tokens/user_0", "x", step)
    return tracker


def test_a_run_that_goes_on_draws_no_point_twice(tmp_path: Path) -> None:
    draw(tmp_path, "train", None, [10]).flush()  # and is killed; it has no checkpoint
    draw(tmp_path, "train", None, [10, 20, 30]).flush()  # killed after the checkpoint of 20
    draw(tmp_path, "train", 20, [30, 40]).close()
    result = board(tmp_path, "train")
    assert [step for step, _ in scalars(result)["step/loss"]] == [10, 20, 30, 40]
    assert [step for step, _ in scalars(result)["valid/NDCG@10"]] == [0]
    assert [step for step, _ in texts(result, "kept_tokens/user_0")] == [10, 20, 30, 40]
    assert [step for step, _ in texts(result, "configuration")] == [1, 21]
    draw(tmp_path, "consensus", None, [10], 40).flush()
    draw(tmp_path, "consensus", None, [10, 20], 40).close()
    result = board(tmp_path, "consensus")
    assert [step for step, _ in scalars(result)["valid/NDCG@10"]] == [40]
    assert [step for step, _ in scalars(result)["step/loss"]] == [50, 60]
    draw(tmp_path, "train", 20, [30]).close()  # as where later checkpoints were deleted
    assert not (tmp_path / "tb" / "consensus").exists()


# --- texts
# ------------------------------------------------------------

NASTY = [
    "a|b",
    "`x`",
    "``",
    "<b>bold</b>",
    "<|endoftext|>",
    "&#124;",
    "&amp;",
    "**x** _y_ ~z~ # - + 1. [a](b) ![i](j)",
    "back\\slash \\| \\*",
    "http://a.b/c",
    "$x$ 'q' \"r\"",
    "    indented",
    "日本語 é 😀",
]


@pytest.mark.parametrize("token", NASTY)
def test_any_token_shows_as_it_is(token: str) -> None:
    table = f"| a | b |\n|---|---|\n| {plain(token)} | {code(token)} 0.25 |"
    shown = markdown_to_safe_html(table)
    cells = [html.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", shown, re.DOTALL)]
    assert [cells[0], *re.findall("<code>(.*)</code> 0.25", cells[1], re.DOTALL)] == [
        token.strip(),
        token,
    ]
    assert len(cells) == 2


@pytest.mark.parametrize(
    ("token", "spelt"),
    [
        ("\n", r"\n"),
        ("a\tb\r", r"a\tb\r"),
        ("\x00", r"\x00"),
        ("\u202ex", r"\u202ex"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_does_not_show_is_spelt(token: str, spelt: str) -> None:
    assert as_shown(f"x {code(token)} y") == f"x {spelt} y"


def test_a_block_is_ended_by_nothing_that_is_in_it() -> None:
    text = "name: a\nfence: '```'\n# <b>x</b> | y"
    assert as_shown(block(text)).strip() == text


def test_texts_of_a_run(run: RunConfig) -> None:
    result = board(run.folder, "train")
    ((step, configuration),) = texts(result, "configuration")
    assert step == 1
    assert as_shown(configuration).strip() == (run.folder / "config.yaml").read_text().strip()
    for user in range(5):
        shown = texts(result, f"kept_tokens/user_{user}")
        assert [step for step, _ in shown] == [4, 8], "at each validation"
        assert re.search(r"Last items: i?\S+", as_shown(shown[0][1]))
        assert len(re.findall(r"<code>(first|second)", html.unescape(shown[0][1]))) == 0
        assert len(re.findall(r"(first|second)-\d+ 0\.\d\d", as_shown(shown[0][1]))) == 8


# --- pages
# ------------------------------------------------------------


def layout_of(result: EventAccumulator) -> Layout:
    (event,) = result.Tensors("custom_scalars__config__")
    return Layout.FromString(event.tensor_proto.string_val[0])


def test_the_layout_opens_with_validation_and_loss_and_joins_the_gates(run: RunConfig) -> None:
    result = board(run.folder, "train")
    layout, tags = layout_of(result), list(scalars(result))
    assert [c.title for c in layout.category] == [
        "Validation, loss, gates",
        "Gates and filters",
        "Speed",
    ]
    assert [chart.title for chart in layout.category[0].chart] == [
        "validation NDCG@10",
        "validation HR@10",
        "loss in training and validation",
        "mean weight of the gates",
    ]
    joined = {c.title: list(c.multiline.tag) for page in layout.category for c in page.chart}
    for title, patterns in joined.items():
        for pattern in patterns:
            assert [tag for tag in tags if re.match(pattern, tag)], f"{title} is empty: {pattern}"
    (gates,) = joined["mean weight of the gates"]
    shown = {tag for tag in tags if re.match(gates, tag)}
    assert shown == {"gate_weight/first", "gate_weight/second"}
    assert layout == layout_of(board(run.folder, "consensus"))


def experiment(folder: Path) -> tuple[Mapping[str, Any], set[str]]:
    """Fields and metrics that TensorBoard's HParams page finds under ``folder``."""
    runs = EventMultiplexer().AddRunsFromDirectory(str(folder))
    runs.Reload()
    context = TBContext(data_provider=MultiplexerDataProvider(runs, str(folder)), multiplexer=runs)
    hparams, request = Context(context), RequestContext()
    result = hparams.experiment_from_metadata(
        request, "", True, hparams.hparams_metadata(request, ""), []
    )
    return (
        {info.name: info for info in result.hparam_infos},
        {info.name.tag for info in result.metric_infos},
    )


def test_runs_and_trials_compare_on_one_hparams_page(run: RunConfig) -> None:
    result = board(run.folder, "hparams")
    final = {tag: points for tag, points in scalars(result).items() if tag.startswith("final/")}
    (test,) = (x for x in read_lines(run.folder / "metrics.jsonl") if x["kind"] == "test")
    ((_, value),) = final["final/test_NDCG@10"]
    assert value == pytest.approx(test["NDCG@10"])
    assert scalars(result)["run/epochs"][0][1] == 3
    other = run.runs_dir / "other"
    write_session(other, {"optimizer.learning_rate": 0.5, "state": "x"}, {"sweep/epochs": 3.0}, 3)
    fields, metrics = experiment(run.runs_dir)
    assert {"state", "backbone.hidden_dim", "mltfr.tables", "optimizer.max_grad_norm"} <= set(
        fields
    )
    rate = fields["optimizer.learning_rate"]
    assert rate.differs
    assert (rate.domain_interval.min_value, rate.domain_interval.max_value) == (0.001, 0.5)
    assert metrics >= {"final/test_NDCG@10", "final/valid_HR@10", "run/seconds", "sweep/epochs"}
    assert not {m for m in metrics if m.startswith(("step/", "valid/"))}


def test_the_projector_has_the_most_popular_items_and_their_titles(run: RunConfig) -> None:
    place = run.folder / SESSION
    (described,) = text_format.Parse(
        (place / "projector_config.pbtxt").read_text(), ProjectorConfig()
    ).embeddings
    vectors = np.loadtxt(place / described.tensor_path, delimiter="\t")
    header, *rows = (place / described.metadata_path).read_text().splitlines()
    assert header == "title\titem_id\tcount"
    assert vectors.shape == (7, 16)
    items = read_map(run.data.path, read_manifest(run.data.path), "items.parquet").to_pylist()
    best = sorted(items, key=lambda item: (-item["count"], item["item_index"]))[:7]
    titles = [item["title"] or item["item_id"] for item in best]
    assert rows == [f"{t}\t{i['item_id']}\t{i['count']}" for t, i in zip(titles, best)]
    chosen = (run.folder / "result.json").read_text()
    (name,) = re.findall(r'"checkpoint": "([^"]+)"', chosen)
    state = load_file(run.folder / "checkpoints" / name / "model.safetensors")
    (weight,) = (t for key, t in state.items() if key.endswith("item_embedding.weight"))
    expected = weight[[item["item_index"] for item in best]].numpy()
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-6)


def test_a_title_is_one_field_of_one_line() -> None:
    assert field("a\tb\nc\u2028d\r") == "a b c d "


# --- measurements
# ------------------------------------------------------------------------------------------------


def test_matrix_work_counts_forward_and_backward_and_changes_nothing() -> None:
    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)
        linear = torch.nn.Linear(12, 20)
        x = torch.randn(6, 12, requires_grad=True)
        linear(x).pow(2).sum().backward()
        q, k, v = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
        tensors = [linear.weight.grad, x.grad, q.grad, k.grad, v.grad]
        return [t for t in tensors if t is not None]

    plainly, work = gradients(), MatrixWork()
    with work:
        counted = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plainly, counted, strict=True))
    linear, product = 3 * 2 * 6 * 12 * 20, 2 * (2 * 3) * 5 * 5 * 8
    assert work.flops in (linear + 6 * product, linear + 7 * product)  # flash scores twice


def test_matrix_work_counts_all_three_products_of_the_loss() -> None:
    hidden, weight = torch.randn(40, 8).requires_grad_(), torch.randn(50, 8).requires_grad_()
    with MatrixWork() as work:
        full_cross_entropy(hidden, weight, torch.arange(1, 41), torch.ones(40)).backward()
    assert work.flops == 3 * 2 * 40 * 50 * 8


@pytest.mark.skipif(usable() is None, reason="there are no kernels on this machine")
def test_matrix_work_holds_that_of_kernels() -> None:
    query, keys, values = (torch.randn(n, 6, 8).requires_grad_() for n in (5, 1, 1))
    kept, log_weights = torch.randint(6, (5, 4)), torch.zeros(5, 4)
    searched, rows = torch.randn(40, 8), torch.randn(300, 8)
    with MatrixWork() as work:
        attend(query, keys[0], values[0], kept, log_weights, None, 2).sum().backward()
        nearest(searched, rows, 3)
    attended = 6 * 2 * 5 * 6 * 4 * 8  # two products forward and four backward
    assert work.flops == attended + 2 * 40 * 300 * 8


def test_the_matrix_peak_is_measured_fast_and_draws_no_number() -> None:
    import time

    torch.manual_seed(5)
    before, start = torch.get_rng_state(), time.perf_counter()
    peak = matrix_peak(torch.device("cpu"), torch.float32)
    assert time.perf_counter() - start < 5  # 0.2 s on a quiet machine
    assert 1e8 < peak < 1e15
    assert torch.equal(before, torch.get_rng_state())
    assert matrix_peak(torch.device("cpu"), torch.float32) == peak


def test_a_stopwatch_adds_up_phases() -> None:
    watch = Stopwatch(torch.device("cpu"))
    assert watch.take() == {}
    for phase in ("forward", "backward", "forward", ""):
        watch.mark(phase)
    assert set(watch.take()) == {"forward", "backward"}
    assert watch.take() == {}
    assert 0 < memory_gib()["memory/resident_gib"] <= memory_gib()["memory/peak_gib"] + 0.01


# --- services
# ------------------------------------------------------------


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_missing_package_is_refused_at_the_start(tmp_path: Path, name: str) -> None:
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(ConfigError, match=f"package {name} is not installed") as caught:
        fit(tiny_config(tmp_path, tracking__also=[name]))
    assert f"`pip install {name}`" in caught.value.remedy
    assert not (tmp_path / "runs").exists(), "nothing was written"
    check_services(tiny_config(tmp_path))


OFFLINE = {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_an_installed_service_takes_a_run_by_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    pytest.importorskip(name, reason=f"needs `pip install {name}`")
    places = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }
    for key, value in (OFFLINE | places).items():
        monkeypatch.setenv(key, value)
    config = tiny_config(tmp_path, tracking__also=[name])
    fit(config)
    assert "gets nothing more" not in capsys.readouterr().out
    for stage in ("train", "consensus"):
        sent = json.loads((config.folder / f"{name}-{stage}.json").read_text())["sent"]
        assert "valid/NDCG@10" in sent
    assert sent["final/test_NDCG@10"] > 0


class Notebook:
    """A service of our own: one line a number, in a file."""

    def __init__(self, name: str, known: str | None, config: RunConfig) -> None:
        self.id = known or f"{name}-id"
        self._file = (config.folder / f"{self.id}.txt").open("a")

    def send(self, values: Mapping[str, float], step: int) -> None:
        self._file.writelines(f"{step} {tag}\n" for tag in values)

    def finish(self) -> None:
        self._file.close()


def test_a_service_that_goes_on_gets_each_number_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(services.CLIENTS, "notebook", Notebook)
    config = tiny_config(tmp_path)
    config.folder.mkdir(parents=True)
    said: list[str] = []

    def opened(*, anew: bool) -> Service:
        return Service("notebook", config, "train", anew=anew, say=said.append)

    first = opened(anew=True)
    for step in (10, 20, 30):
        first.send({"step/loss": 1.0}, step)
    first.close()
    again = opened(anew=False)  # from the checkpoint of step 20
    again.send({"step/loss": 1.0}, 30)
    again.send({"valid/HR@10": 1.0}, 30)
    again.send({"step/loss": 1.0}, 40)
    again.close()
    log = config.folder / "tiny-train-id.txt"
    of_loss = [f"{step} step/loss" for step in (10, 20, 30)]
    assert log.read_text().splitlines() == [*of_loss, "30 valid/HR@10", "40 step/loss"]
    anew = opened(anew=True)
    anew.send({"step/loss": 1.0}, 10)
    anew.close()
    assert log.read_text().splitlines()[-1] == "10 step/loss"
    assert said == []


def test_a_service_that_fails_is_told_of_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(services.CLIENTS, "notebook", Notebook)
    config, said = tiny_config(tmp_path), []
    absent = Service(
        "notebook", config, "train", anew=True, say=said.append
    )  # no folder to write in
    absent.send({"step/loss": 1.0}, 10)
    absent.close()
    config.folder.mkdir(parents=True)
    broken = Service("notebook", config, "train", anew=True, say=said.append)
    broken.close()
    for step in (10, 20):
        broken.send({"step/loss": 1.0}, step)  # its file is closed
    assert len(said) == 2
    assert all(line.startswith("  warning: notebook gets nothing more") for line in said)
    assert "No such file" in said[0]
    assert "closed file" in said[1]


def test_a_stage_and_the_outcome_reach_the_service_and_no_projector_is_written(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(services.CLIENTS, "notebook", Notebook)
    tracking = run.tracking.model_copy(update={"also": ("notebook",), "projector_items": 0})
    config = run.model_copy(update={"tracking": tracking, "runs_dir": tmp_path, "name": "other"})
    config.folder.mkdir()
    tracker = Tracker(config.folder, active=True, stage="consensus", step=None, base_step=8)
    tracker.open_with(config)
    tracker.log("step", 1, {"loss": 1.0}, epoch=1)
    tracker.close()
    result = load_result(run.folder)
    assert result is not None
    show_outcome(config, None, result, "consensus")  # type: ignore[arg-type]
    log = (config.folder / "other-consensus-id.txt").read_text().splitlines()
    assert log[0] == "9 step/loss"
    assert f"{result.step} final/test_NDCG@10" in log
    assert [p.name[:6] for p in (config.folder / SESSION).iterdir()] == ["events"]
    assert (run.folder / SESSION / "projector_config.pbtxt").exists()


def test_the_service_is_closed_by_a_run_that_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Notebook] = []

    def opening(name: str, known: str | None, config: RunConfig) -> Notebook:
        opened.append(Notebook(name, known, config))
        return opened[-1]

    monkeypatch.setitem(services.CLIENTS, "notebook", opening)
    config = tiny_config(tmp_path)
    config = config.model_copy(
        update={"tracking": config.tracking.model_copy(update={"also": ("notebook",)})}
    )
    monkeypatch.setattr("mltfr_dist.training.running.fit.check_services", lambda _config: None)
    raised: list[BaseException] = []

    def run() -> None:  # in a thread signals are not taken, and the request stays
        try:
            fit(config)
        except StoppedError as error:
            raised.append(error)

    request_stop()
    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    finally:
        forget_request()
    assert len(raised) == len(opened) == 1
    assert opened[0]._file.closed
