"""A signal is heeded in the midst of a validation, a Fisher pass and the last ranking."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from support import REPOSITORY, read_lines, relative_difference, tiny_config

from mltfr_dist.config import RunConfig
from mltfr_dist.distributed.kept import latest
from mltfr_dist.distributed.meeting import stop_ranks
from mltfr_dist.distributed.signals import STOP_SIGNALS, request_stop
from mltfr_dist.errors import ConfigError, StoppedError
from mltfr_dist.schema import changed
from mltfr_dist.training.evaluating import baselines, compare
from mltfr_dist.training.run_folder import load_config, load_result
from mltfr_dist.training.running import loop, stages
from mltfr_dist.training.running.fit import fit

T = TypeVar("T")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    stop_ranks()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that nothing disturbs."""
    config = tiny_config(
        tmp_path_factory.mktemp("whole"), training__epochs=2, training__consensus_epochs=1
    )
    fit(config)
    return config


def after_the_first(batches: Iterable[T], seen: list[int]) -> Iterator[T]:
    """The batches; a signal comes while the first is worked on."""
    for batch in batches:
        seen.append(1)
        yield batch
        request_stop()


@pytest.mark.parametrize(
    ("module", "name", "place", "words"),
    [
        (loop, "evaluate", 1, "ranking the valid split"),
        (stages, "fisher_diagonals", 1, "the Fisher pass"),
        (compare, "evaluate_slices", 1, "ranking the test split"),
    ],
)
def test_a_signal_in_a_long_pass(
    whole: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    place: int,
    words: str,
) -> None:
    real: Callable[..., Any] = getattr(module, name)
    seen: list[int] = []

    def interrupted(*given: Any) -> Any:
        batches = after_the_first(given[place], seen)
        return real(*given[:place], batches, *given[place + 1 :])

    config = whole.model_copy(update={"runs_dir": tmp_path})
    monkeypatch.setattr(module, name, interrupted)
    with pytest.raises(StoppedError, match=words):
        fit(config)
    assert len(seen) == 1, "the wait is one batch"
    assert latest(config.folder / "checkpoints", "train") is not None, "the epoch is not lost"
    assert load_result(config.folder) is None
    monkeypatch.setattr(module, name, real)
    fit(config)
    assert read_lines(config.folder / "metrics.jsonl") == read_lines(whole.folder / "metrics.jsonl")
    result, expected = load_result(config.folder), load_result(whole.folder)
    assert result is not None
    assert expected is not None
    assert (result.test, result.checkpoint) == (expected.test, expected.checkpoint)


def test_a_signal_while_a_baseline_is_fitted(
    whole: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is heeded after the block of items that is worked on; the run then begins with it anew."""
    config = whole.model_copy(update={"runs_dir": tmp_path, "baselines": ("item_knn",)})
    real, seen = baselines._nearest, []

    def interrupted(*given: Any) -> Any:
        seen.append(1)
        request_stop()
        return real(*given)

    with monkeypatch.context() as signalled:
        signalled.setattr(baselines, "_PAIRS_AT_ONCE", 100)
        signalled.setattr(baselines, "_nearest", interrupted)
        with pytest.raises(StoppedError, match="in the midst of fitting item_knn"):
            fit(config)
    assert len(seen) == 1, "the wait is one block"
    fit(config)
    assert load_result(config.folder) is not None


def test_a_run_goes_on_with_other_settings_that_change_no_number(
    whole: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Begun at ZeRO 1 with tables in memory, gone on with at ZeRO 3 with mapped tables."""
    config, real = whole.model_copy(update={"runs_dir": tmp_path}), loop.evaluate
    monkeypatch.setattr(
        loop,
        "evaluate",
        lambda score, users, *rest: real(score, after_the_first(users, []), *rest),
    )
    with pytest.raises(StoppedError):
        fit(config)
    monkeypatch.setattr(loop, "evaluate", real)
    other = {
        "deepspeed": str(REPOSITORY / "ds_configs" / "zero3.json"),
        "mltfr.placement": "mmap",
        "training.hang_seconds": 900.0,
        "checkpoint.every_steps": 3,
    }
    with pytest.raises(ConfigError, match=r"different run: training\.seed is 0 there and 1 here\."):
        fit(changed(config, other | {"training.seed": 1}, source="a test"))
    assert load_config(config.folder) == config
    capsys.readouterr()
    fit(changed(config, other, source="a test"))
    said = capsys.readouterr().out
    for key in other:
        assert f"another setting than before, which changes no number: {key} is " in said
    lines, expected = (read_lines(c.folder / "metrics.jsonl") for c in (config, whole))
    assert [(t["kind"], t["stage"], t["step"]) for t in lines] == [
        (t["kind"], t["stage"], t["step"]) for t in expected
    ]
    losses = [[t["loss"] for t in run if t["kind"] == "step"] for run in (expected, lines)]
    assert relative_difference(*losses) < 1e-5
    result, before = load_result(config.folder), load_result(whole.folder)
    assert result is not None
    assert before is not None
    assert result.test == pytest.approx(before.test)
