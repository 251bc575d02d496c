from collections.abc import Iterator

import pytest
import torch

from mltfr_dist import progress

BLOCKS = [(start, torch.empty(10, 1)) for start in range(0, 50, 10)]


@pytest.fixture
def _slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six seconds a block."""
    times: Iterator[float] = iter(range(0, 600, 6))
    monkeypatch.setattr(progress, "monotonic", lambda: next(times))


@pytest.mark.usefixtures("_slow")
def test_a_log_gets_a_line_now_and_then_with_rate_and_time_left() -> None:
    lines: list[str] = []
    assert list(progress.follow(BLOCKS, "reading", 50, lines.append)) == BLOCKS
    assert lines == [
        "  reading: 20 of 50 rows, 2 a second, about 18 s left",
        "  reading: 40 of 50 rows, 2 a second, about 6 s left",
    ]


def test_short_work_says_nothing() -> None:
    lines: list[str] = []
    assert list(progress.follow(BLOCKS, "reading", 50, lines.append)) == BLOCKS
    assert lines == []


@pytest.mark.usefixtures("_slow")
def test_a_terminal_gets_one_line_that_is_renewed_and_wiped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    lines: list[str] = []
    list(progress.follow(BLOCKS, "reading", 50, lines.append))
    shown = capsys.readouterr().err
    assert lines == []
    assert shown.count("\r") == 5  # four blocks, and the end
    assert "\n" not in shown
    assert shown.endswith("\r\x1b[K")
