"""Faults of a single rank, injected into real runs: all ranks see them, and none is left
waiting.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

import pytest
from support import REPOSITORY, clean_environment, read_lines, run_ranks, tiny_config, torchrun

from mltfr_dist.config import RunConfig
from mltfr_dist.distributed import checkpoint, kept
from mltfr_dist.errors import EXIT_BAD_INPUT, EXIT_LOST
from mltfr_dist.training.run_folder import dump_config

WORKER = Path(__file__).parent / "health_worker.py"
POISONED = "backbone.item_embedding.weight"


@pytest.mark.integration
def test_a_fault_of_one_rank_is_skipped_on_all(tmp_path: Path) -> None:
    tiny_config(tmp_path)
    output = tmp_path / "found.json"
    run_ranks(2, WORKER, "skipped", str(tmp_path), str(output))
    result = json.loads(output.read_text())
    for name in ("zero0", "zero1", "zero2", "zero3", "accumulated", "bf16", "rows", "rows zero3"):
        verdicts = result[name]["verdicts"]
        assert verdicts == [[2, POISONED], [4, "loss"]], name
        assert result[name]["losses"] == result[name]["without"], (
            f"{name}: a skipped step left a trace"
        )
    for step in (1, 3):
        assert result[f"after {step} resumed"] == result[f"after {step}"]


@pytest.mark.integration
def test_a_long_pass_that_goes_on_is_no_hang(tmp_path: Path) -> None:
    """A Fisher pass, and one rank's work while the other waits, each longer than the watchdog's
    patience.
    """
    tiny_config(tmp_path)
    run_ranks(2, WORKER, "slow", str(tmp_path), str(tmp_path / "unused.json"))
    said = [json.loads((tmp_path / f"slow-{rank}.json").read_text()) for rank in (0, 1)]
    assert said == [["done", "ConfigError"], ["waited", "OtherRankError"]]


def faulty_run(config: RunConfig, fault: str, step: int) -> tuple[str, str, float]:
    """Run train.py on two ranks with a fault on the second; returns stdout, stderr and seconds."""
    place = config.runs_dir.parent / f"{config.name}.yaml"
    place.write_text(dump_config(config))
    started = time.monotonic()
    command = torchrun(2, WORKER, fault, str(place), str(step))
    done = subprocess.run(
        command, env=clean_environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode != 0, done.stdout
    return done.stdout, done.stderr, time.monotonic() - started


def stage_file(stage: int) -> str:
    return str(REPOSITORY / "ds_configs" / f"zero{stage}.json")


def assert_last(stderr: str, message: str) -> None:
    """torchrun's summary ends with the message, and with the rule below it."""
    *_, last, rule = stderr.rstrip().splitlines()
    assert last.startswith(f"  {message}"), stderr
    assert set(rule) == {"="}


def test_too_many_faults_stop_the_run_and_name_what_is_not_finite(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path, training__max_skipped_steps=2, checkpoint__every_steps=1, checkpoint__keep_last=1
    )
    stdout, stderr, _ = faulty_run(config, "nan", 3)
    assert stdout.count("skipped") == 3
    assert stderr.count(f"not finite: {POISONED}") == 2, "one rank speaks, and so does torchrun"
    assert "train-step000000003" in stderr
    assert_last(stderr, "MltfrError: The last 3 steps, up to 6 of stage `train`,")
    assert f"exitcode  : {EXIT_BAD_INPUT}" in stderr
    last = kept.latest(config.folder / "checkpoints", "train")
    assert last is not None
    assert last.name == "train-step000000003", "what was saved before the faults is kept"
    assert checkpoint.read(last)
    lines = [
        line for line in read_lines(config.folder / "metrics.jsonl") if line["kind"] == "skipped"
    ]
    assert [(line["step"], line["in_a_row"], line["nonfinite"]) for line in lines] == [
        (s, s - 3, [POISONED]) for s in (4, 5, 6)
    ]


@pytest.mark.integration
def test_a_hang_ends_with_a_stack_trace_of_every_rank(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, training__hang_seconds=20, deepspeed=stage_file(0))
    _, stderr, seconds = faulty_run(config, "hang", 3)
    assert seconds < 150
    for rank in (0, 1):
        assert f"Rank {rank} on " in stderr
        assert "no progress for 20 s; last: step 3 of stage `train`" in stderr
    assert "in stuck_here" in stderr, "rank 1's trace shows where it hangs"
    assert "shared_memory.py" in stderr, "rank 0's trace shows what it waits in"
    assert f"exitcode  : {EXIT_LOST}" in stderr
    assert re.search(r"\n  Rank \d on .*raise training.hang_seconds\.\n=+\n$", stderr), "said last"
    traces, _, words = stderr.partition(" has made no progress")
    assert "most recent call first" in traces
    assert "most recent call first" not in words, "the words stand below the traces of all ranks"


@pytest.mark.integration
@pytest.mark.parametrize("stage", [0, 1], ids=["through memory", "through gloo"])
def test_a_killed_rank_is_told_in_words(tmp_path: Path, stage: int) -> None:
    config = tiny_config(tmp_path, training__hang_seconds=60, deepspeed=stage_file(stage))
    _, stderr, seconds = faulty_run(config, "die", 3)
    assert seconds < 60
    assert "has lost another rank" in stderr
    # torchrun's summary names both: the rank that lost the other, and the signal that killed it.
    # Which stands last is left to whole seconds: it sorts by them.
    summary = stderr.rpartition("Failures:")[2]
    assert "\n  LostRankError: Rank 0 on " in summary
    assert "Signal 9 (SIGKILL)" in summary
    assert "RuntimeError" not in stderr, "the words stand for the network layer's traceback"
