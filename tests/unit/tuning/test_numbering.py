"""A trial's number is its own for ever: one that was deleted is run again under it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import tiny_config
from test_suggest import BASE, Known, space_of, sweep_of, worth

from mltfr_dist.training.run_folder import CONFIG, dump_config
from mltfr_dist.tuning.numbering import Next, next_trial
from mltfr_dist.tuning.suggest import Space


def begun(space: Space, folder: Path, count: int) -> dict[int, Known]:
    known: dict[int, Known] = {}
    for result in all_next(space, folder, known, count):
        assert not result.was_deleted
    return known


def all_next(space: Space, folder: Path, known: dict[int, Known], count: int) -> Iterator[Next]:
    while len(known) < count and (result := next_trial(space, folder, known)) is not None:
        values = result.record.values
        known[result.number] = Known(values, worth(values))
        yield result


@pytest.mark.parametrize("algorithm", ["random", "grid"])
def test_what_was_deleted_is_drawn_again_as_its_number_drew_it(
    algorithm: str, tmp_path: Path
) -> None:
    space = space_of(sweep_of(algorithm), BASE if algorithm == "random" else None)
    whole = begun(space, tmp_path, 9)
    left = {number: one for number, one in whole.items() if number not in (0, 3, 4)}
    result = list(all_next(space, tmp_path, dict(left), 9))
    assert [(one.number, one.record.values) for one in result] == [
        (number, whole[number].values) for number in (0, 3, 4)
    ]
    assert all(one.was_deleted for one in result)


def leave_run(folder: Path, name: str, seed: int) -> None:
    run = folder / "trials" / name
    run.mkdir(parents=True)
    (run / CONFIG).write_text(dump_config(tiny_config(folder, training__seed=seed)))


def test_a_run_that_is_still_there_says_the_values_that_tpe_chose(tmp_path: Path) -> None:
    sweep = sweep_of("tpe", search={"training.seed": {"integers": [0, 99]}})
    space = Space(sweep, {"training.seed": 0}, None)
    known = {n: Known({"training.seed": 50 + n}, 0.1 * n) for n in (0, 2, 3)}
    leave_run(tmp_path, "0001", 7)
    result = next_trial(space, tmp_path, known)
    assert result is not None
    assert (result.number, result.record.values) == (1, {"training.seed": 7})
    assert (result.record.generation, result.was_deleted) == (0, True)
    for generation in (2, 10):
        leave_run(tmp_path, f"0001-{generation}", 20 + generation)
    result = next_trial(space, tmp_path, known)
    assert result is not None
    assert (result.record.values, result.record.generation) == ({"training.seed": 30}, 9)


def test_a_number_whose_values_another_has_by_now_stays_unused(tmp_path: Path) -> None:
    sweep = sweep_of("random", search={"training.seed": {"integers": [0, 99]}})
    space = Space(sweep, {"training.seed": 0}, None)
    leave_run(tmp_path, "0001", 7)
    known = {0: Known({"training.seed": 7}, 0.1), 2: Known({"training.seed": 8}, 0.1)}
    result = next_trial(space, tmp_path, known)
    assert result is not None
    assert (result.number, result.was_deleted) == (3, False)
    assert result.record.values["training.seed"] not in (7, 8)
