"""What a sweep says of the time that is left, and how soon it says anything."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mltfr_dist.tuning.status import Running, seconds_left


def test_running_trials_are_in_the_time_that_is_left() -> None:
    # Two slots, 100 s so far for 5 of 10 epochs, and for 2 of 10.
    running = [Running(began=0.0, first=0, epoch=5), Running(began=0.0, first=0, epoch=2)]
    left = seconds_left(100.0, running, [], 0, 2, 10, stops=False)
    assert left == pytest.approx(400)
    # The last one of three, 27 s before its end.
    last = [Running(began=0.0, first=0, epoch=9)]
    assert seconds_left(243.0, last, [270.0, 270.0], 0, 2, 10, stops=False) == pytest.approx(27)


def test_waiting_trials_take_the_slots_that_are_free_first() -> None:
    running = [Running(began=0.0, first=0, epoch=5), Running(began=80.0, first=0, epoch=0)]
    # 100 s are left of the first; the second has shown nothing, and takes the mean of 200 s, so 180
    # s are left of it.
    left = seconds_left(100.0, running, [200.0], 1, 2, 10, stops=False)
    assert left == pytest.approx(100 + 200)
    assert seconds_left(100.0, running, [200.0], 2, 2, 10, stops=False) == pytest.approx(380)


def test_a_trial_that_goes_on_is_measured_by_its_own_epochs() -> None:
    running = [Running(began=0.0, first=8, epoch=9)]
    assert seconds_left(30.0, running, [], 0, 1, 10, stops=False) == pytest.approx(30)


def test_trials_that_may_be_stopped_early_take_what_others_took() -> None:
    running = [Running(began=0.0, first=0, epoch=1)]
    assert seconds_left(10.0, running, [30.0], 0, 1, 100, stops=True) == pytest.approx(20)
    assert seconds_left(10.0, running, [30.0], 0, 1, 100, stops=False) == pytest.approx(990)


def test_nothing_is_said_before_anything_is_known() -> None:
    running = [Running(began=0.0, first=0, epoch=0)]
    assert seconds_left(30.0, running, [], 3, 1, 10, stops=False) is None


def test_a_sweeps_first_line_waits_for_no_large_library() -> None:
    code = (
        "import sys, mltfr_dist.cli, mltfr_dist.tuning.source\n"
        "print([m for m in ('torch', 'ray', 'scipy', 'matplotlib', 'optuna') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
