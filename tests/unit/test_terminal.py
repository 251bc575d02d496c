"""What 80 columns show of each long work: no broken line, nothing left of a longer one."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import pytest
import torch
from support import tiny_config

import train
from mltfr_dist import progress
from mltfr_dist.cli import main
from mltfr_dist.cli.screen import fitted
from mltfr_dist.data.prepare import database
from mltfr_dist.errors import ConfigError, fail
from mltfr_dist.progress import StatusLine, duration, say
from mltfr_dist.tables import clean
from mltfr_dist.training.reporting import tracking
from mltfr_dist.training.reporting.tracking import Tracker
from mltfr_dist.training.run_folder import dump_config

COLUMNS = 80


class Screen:
    """A real terminal, and what it shows."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
        self.stream: TextIO = os.fdopen(slave, "w", buffering=1)
        self.sent = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # the other side is closed
                return
            self.sent += data.decode()

    def take(self) -> None:
        """Send what is printed from here on to it; pytest has its own streams during the setup."""
        sys.stdout = sys.stderr = self.stream

    def lines(self) -> list[str]:
        """What stands there at the end; fails if a line did not fit."""
        self.stream.close()
        self._reader.join(10)
        os.close(self._master)
        rows, column = [""], 0
        for block in self.sent.replace("\x1b[K", "\0"):
            if block == "\r":
                column = 0
            elif block == "\n":
                rows.append("")
            elif block == "\0":
                rows[-1] = rows[-1][:column]
            else:
                rows[-1] = rows[-1][:column].ljust(column) + block + rows[-1][column + 1 :]
                column += 1
                assert column <= COLUMNS, f"broken by the terminal: {rows[-1]}"
        return [row.rstrip() for row in rows]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    monkeypatch.setattr(progress, "SECONDS_ON_TERMINAL", 0.0)
    shown, before = Screen(), (sys.stdout, sys.stderr)
    yield shown
    sys.stdout, sys.stderr = before
    shown.stream.close()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.7, "1 h 00 min"),
        (3 * 3600 + 299, "3 h 05 min"),
        (50 * 3600, "50 h 00 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_status_line_is_cut_renewed_and_wiped(screen: Screen) -> None:
    screen.take()
    line = StatusLine(screen.stream, 10, print)
    line.show("long " * 30)
    line.show("short")
    say("a line of its own")
    line.show("x" * 79)
    line.wipe()
    assert screen.lines() == ["a line of its own", ""]
    assert "short" in screen.sent


def test_an_error_takes_the_place_of_a_status_line(screen: Screen) -> None:
    screen.take()
    StatusLine(screen.stream, 10, print).show("step 3")
    assert fail(ConfigError("What.", remedy="How.")) == 2
    assert screen.lines() == ["ConfigError: What. How.", ""]


def test_an_error_is_broken_between_words_and_a_command_in_it_is_not(screen: Screen) -> None:
    screen.take()
    command = "`mltfr sweep runs/sweeps/one/sweep.yaml --retry-failed`"
    fail(ConfigError("The trial failed, " * 5 + "again.", remedy=f"Type {command} to go on."))
    shown = screen.lines()
    assert len(shown) == 4
    assert shown[1].startswith("failed, The trial failed,")
    assert any(command in line for line in shown)


@pytest.mark.parametrize(
    "words",
    [
        ["prepare", "--format", "help"],
        ["fetch"],
        ["frobnicate"],
        ["train", "--preset", "demo", "mltfr.router.topk=3"],
        ["sweep", "demo", "num_trial=4"],
        ["report", "nowhere", "--differense", "0.1"],
    ],
    ids=" ".join,
)
def test_what_commands_list_and_refuse_fits(screen: Screen, words: list[str]) -> None:
    screen.take()
    with suppress(SystemExit):
        main(words)
    assert len(" ".join(screen.lines())) > 100


MARKDOWN = """# Run

| model | split | {heads} |
|---|---|{rule}|
| sasrec + MLTFR | valid | {cells} |
| sasrec + MLTFR | test | {cells} |

{prose}

```yaml
{code}
```
"""


def test_a_wide_table_of_a_report_comes_in_parts() -> None:
    heads = [f"metric-{k}" for k in range(14)]
    prose, code = "many words, " * 12 + "end.", "key: " + "long " * 30 + "end"
    text = MARKDOWN.format(
        heads=" | ".join(heads),
        rule="|".join(["---:"] * 14),
        cells=" | ".join(f"0.{k:06}" for k in range(14)),
        prose=prose,
        code=code,
    )
    shown = fitted(text, 80).split("\n")
    assert [line for line in shown if len(line) > 80] == [code]
    tests = [line for line in shown if line.startswith("| sasrec + MLTFR | test ")]
    cells = [cell.strip() for line in tests for cell in line.strip("|").split("|")[2:]]
    assert cells == [f"0.{k:06}" for k in range(14)], "all are there, once, each by its model"
    at = next(k for k, line in enumerate(shown) if "metric-13" in line)
    assert shown[at].index("metric-13") == shown[at + 3].index("0.000013")
    assert prose in " ".join(shown)
    assert fitted(text, 400) == text


def test_a_wide_table_of_a_comparison_comes_in_parts() -> None:
    rows = [("slice", *(f"column {k}" for k in range(9)))]
    rows += [(f"rare target ({k})", *(f"{k}.{n:05}" for n in range(9))) for k in range(3)]
    text = "\n".join("  ".join([f"{a:<16}", *(f"{b:>10}" for b in more)]) for a, *more in rows)
    shown = fitted(text, 80).split("\n")
    assert max(map(len, shown)) <= 80
    assert [line.split()[3:] for line in shown if line.startswith("rare target (1)")] == [
        [f"1.{n:05}" for n in range(5)],
        [f"1.{n:05}" for n in range(5, 9)],
    ]


def test_lines_are_broken_between_words_and_a_path_is_not(screen: Screen) -> None:
    screen.take()
    say("  stored in /a-" + "b" * 65 + " with more words than fit\nshort")
    assert screen.lines() == [
        "  stored in /a-" + "b" * 65,
        "      with more words than fit",
        "short",
        "",
    ]


def test_a_log_has_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    long = "word " * 30 + "end"
    say(long)
    StatusLine(sys.stdout, 10, say).show(long)
    assert capsys.readouterr().out == f"{long}\n{long}\n"


def test_whitening_a_table(screen: Screen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clean, "PRODUCT_ENTRIES", 1 << 18)
    screen.take()
    rows = torch.randn(6000, 100).tolist()
    words = "\n".join(f"w{i} {' '.join(f'{x:.4f}' for x in row)}" for i, row in enumerate(rows))
    (tmp_path / f"{'vectors' * 9}.txt").write_text(f"6000 100\n{words}\n")
    source = str(tmp_path / f"{'vectors' * 9}.txt")
    code = main(
        ["tables", source, "--output", str(tmp_path / "t"), "--name", "v", "--normalise", "whiten"]
    )
    lines = screen.lines()
    assert code == 0, lines
    assert (tmp_path / "t" / "v" / "table.json").exists()
    for work in ("reading", "covariance", "whitening", "hashing"):
        assert f"  {work}: " in screen.sent
    assert not [line for line in lines if " a second" in line], "nothing is left of a status line"


def test_preparing(screen: Screen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen.take()
    (tmp_path / "in.txt").write_text("\n".join(f"u{u} a b c d e{u % 3}" for u in range(40)))
    monkeypatch.setattr(database, "_SECONDS_BETWEEN_LINES", 0.01)
    command = ["prepare", "in.txt", "out", "--format", "sequences", "--user-core", "1"]
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--item-core", "1"]) == 0
    shown = screen.lines()
    start = next(i for i, line in enumerate(shown) if line.startswith("leave_one_out"))
    assert "no leak; 0 users train only;" in " ".join(" ".join(shown[start : start + 4]).split())


def test_training(screen: Screen, tmp_path: Path) -> None:
    screen.take()
    config = tiny_config(tmp_path, training__epochs=2, training__consensus_epochs=1)
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert train.main(["--config", str(tmp_path / "c.yaml")]) == 0
    shown = screen.lines()
    assert "at most" in screen.sent, "there was a status line"
    assert not [line for line in shown if "at most" in line], "nothing is left of it"
    assert any(line.startswith("  train epoch 2/2  validation HR@10") for line in shown)


def test_the_line_of_a_large_run(screen: Screen, tmp_path: Path) -> None:
    screen.take()
    tracker = Tracker(tmp_path, active=True, stage="consensus", step=0)
    tracker.progress(123_456, 12_345_678, 8192, 12.3456)
    tracker.close()
    assert screen.lines() == [""]
    assert "consensus step 123456/12345678  loss 12.3456" in screen.sent


def test_the_same_in_a_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times: Iterator[float] = iter([0.0, 3600.0, 3601.0, 3700.0])
    monkeypatch.setattr(tracking.time, "monotonic", lambda: next(times))
    tracker = Tracker(tmp_path, active=True, stage="train", step=0)
    for step in (1000, 1001, 1100):
        tracker.progress(step, 3000, 64, 0.5)
    tracker.close()
    assert capsys.readouterr().out == (
        "  train step 1000/3000  loss 0.5000  18 sequences/s  at most 2 h 00 min left\n"
        "  train step 1100/3000  loss 0.5000  19 sequences/s  at most 1 h 47 min left\n"
    )
