"""A GPU gives the CPU's numbers, alone under NCCL; skipped where there is none. `make gpu-check`
runs them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BF16, CASES
from support import REPOSITORY, clean_environment, read_lines, tiny_config

from mltfr_dist.data.stream.training import BatchLayout
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.exported import load_exported
from mltfr_dist.models.replay import Replay, why_launched
from mltfr_dist.training.build import build_model
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.run_folder import dump_config, load_result
from mltfr_dist.training.streams import train_stream
from mltfr_dist.training.using.inference import load_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here"),
    pytest.mark.timeout(900),
]

WORKER = Path(__file__).with_name("worker.py")
NAMES = [*CASES, "published"]
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
STEPS = 20
TOLERANCE = 1e-4
"""By which a step's loss may differ between CPU and GPU, relative."""
BF16_TOLERANCE = 2e-2
PROCESSES = max(1, min(4, (os.cpu_count() or 1) // 4))
"""Side by side on each device: each holds a small model, and their starts take longest."""

Traces = dict[str, dict[str, Any]]


def start(folder: Path, which: str, names: Sequence[str], **more: str) -> list[Any]:
    """Worker processes for ``names``, with where each writes."""
    precision = "bf16" if which == "bf16" else "fp32"
    started = []
    for share in range(PROCESSES):
        mine = names[share::PROCESSES]
        if mine:
            output = folder / f"{which}-{share}.json"
            command = [sys.executable, str(WORKER), str(folder), str(output), precision, *mine]
            log = output.with_suffix(".log").open("w")
            process = subprocess.Popen(
                command, env=clean_environment(**more), stdout=log, stderr=log, cwd=folder
            )
            started.append((process, output))
    return started


def collect(started: list[Any]) -> Traces:
    result: Traces = {}
    for process, output in started:
        code = process.wait(timeout=800)
        assert code == 0, output.with_suffix(".log").read_text()[-6000:]
        result |= json.loads(output.read_text())
    return result


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Traces]:
    """By device (and precision): what every case's run said."""
    folder = tmp_path_factory.mktemp("gpu")
    tiny_config(folder)  # inputs, before several processes want to write them
    started = {
        "cpu": start(folder, "cpu", NAMES, **ON_CPU),
        "gpu": start(folder, "gpu", NAMES),
        "bf16": start(folder, "bf16", BF16),
    }
    return {which: collect(processes) for which, processes in started.items()}


def losses(run: dict[str, Any]) -> list[float]:
    assert "error" not in run, run["error"]
    return [line["loss"] for line in run["lines"] if "loss" in line][:STEPS]


def difference(first: list[float], second: list[float]) -> float:
    assert len(first) == len(second) > 10
    return max(abs(a - b) / abs(a) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_of_the_cpu(traces: dict[str, Traces], name: str) -> None:
    on_cpu, on_gpu = traces["cpu"][name], traces["gpu"][name]
    apart = difference(losses(on_cpu), losses(on_gpu))
    print(f"{name}: {apart:.1e}")
    assert apart <= TOLERANCE
    for key, value in on_cpu["valid"].items():
        assert on_gpu["valid"][key] == pytest.approx(value, abs=0.03), key


@pytest.mark.parametrize("name", BF16)
def test_bf16_stays_near_fp32(traces: dict[str, Traces], name: str) -> None:
    apart = difference(losses(traces["gpu"][name]), losses(traces["bf16"][name]))
    assert 0 < apart <= BF16_TOLERANCE


def train(config: Any, place: Path) -> subprocess.Popen[bytes]:
    place.write_text(dump_config(config))
    log = place.with_suffix(".log").open("ab")
    command = [sys.executable, str(REPOSITORY / "train.py"), "--config", str(place)]
    return subprocess.Popen(command, env=clean_environment(), stdout=log, stderr=log)


def test_a_killed_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    """With dropout: its state on the GPU comes back too. Sums of a GPU differ in their last
    bits.
    """
    changes = {"checkpoint__every_steps": 2, "training__epochs": 4}
    whole = tiny_config(tmp_path, name="whole", **changes)
    killed = tiny_config(tmp_path, name="killed", **changes)
    running = train(whole, tmp_path / "whole.yaml")
    process = train(killed, tmp_path / "killed.yaml")
    metrics = killed.folder / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 7):
        assert process.poll() is None, (tmp_path / "killed.log").read_text()[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert train(killed, tmp_path / "killed.yaml").wait(timeout=240) == 0
    assert running.wait(timeout=240) == 0
    expected, result = (
        [line["loss"] for line in read_lines(c.folder / "metrics.jsonl") if "loss" in line]
        for c in (whole, killed)
    )
    assert difference(expected, result) <= 1e-5
    first, second = load_result(whole.folder), load_result(killed.folder)
    assert first is not None
    assert second is not None
    for key, value in first.test.items():
        assert second.test[key] == pytest.approx(value, abs=0.01), key


def test_recorded_steps_are_those_that_launch_their_kernels(tmp_path: Path) -> None:
    """With dropout, which both draw alike, and shortlists that are chosen anew."""
    config, device = tiny_config(tmp_path), torch.device("cuda")
    size, runs = config.training.global_batch_size, list[list[float]]()
    for records in (False, True):
        torch.manual_seed(0)
        model = build_model(config, load_inputs(config, verify=False), with_consensus=True)
        model.to(device).train()
        assert why_launched(model, device) is None
        model.replay = player = Replay(model)
        player.records = records
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        losses: list[float] = []
        stream = train_stream(config, BatchLayout(0, 1, size, size))
        steps = [batches for epoch in range(3) for batches in stream.epoch(epoch)]
        for step, batches in enumerate(steps):
            torch.manual_seed(step)
            model.before_update(step, batches.micro_batches, Ranks(0, 1, device))
            batch = batches.micro_batches[0].in_room(player.max_len).to(device)
            total = model(batch).terms["loss"].sum
            optimizer.zero_grad()
            (total / batches.num_targets).backward()
            optimizer.step()
            losses.append(total.item())
        runs.append(losses)
        assert player.records == records
        assert bool(player._held) == records
    assert difference(*runs) <= 1e-5


def mltfr(*arguments: str, **more: str) -> str:
    command = [sys.executable, "-m", "mltfr_dist", *arguments]
    done = subprocess.run(
        command, env=clean_environment(**more), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_a_model_of_the_gpu_is_used_on_either(tmp_path: Path) -> None:
    """Evaluated, asked for recommendations and exported on the GPU, and the same on the CPU."""
    config = tiny_config(tmp_path, training__epochs=2)
    assert train(config, tmp_path / "run.yaml").wait(timeout=240) == 0
    run, result = str(config.folder), load_result(config.folder)
    assert result is not None
    ask = ("recommend", run, "--history", "i1,i2,i3", "--k", "5")
    assert mltfr(*ask) == mltfr(*ask, **ON_CPU)
    evaluated = mltfr("evaluate", run, "--split", "test")
    assert f"{result.test['NDCG@10']:.4f}" in evaluated
    mltfr("export", run, str(tmp_path / "model"))
    history = ["i1", "i2", "i3"]
    on_cpu = load_exported(tmp_path / "model").scores([history])[0].topk(5).values
    loaded = load_run(config.folder)
    assert loaded.device.type == "cuda"
    on_gpu = [item.score for item in loaded.recommend(history, k=5, filter_seen=False)]
    torch.testing.assert_close(torch.tensor(on_gpu), on_cpu, rtol=1e-4, atol=1e-4)
