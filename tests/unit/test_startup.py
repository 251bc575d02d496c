"""The collector of garbage rests while a process of ours starts, and works afterwards."""

from __future__ import annotations

import gc

import pytest

from mltfr_dist.startup import start_up, started


def test_it_rests_until_the_start_is_over() -> None:
    assert gc.isenabled()
    with start_up():
        assert not gc.isenabled()
        before = gc.get_freeze_count()
        kept = [[] for _ in range(1000)]
        started()
        assert gc.isenabled()
        assert gc.get_freeze_count() >= before + len(kept)
    assert gc.isenabled()


def test_it_works_again_after_a_start_that_failed() -> None:
    with pytest.raises(ValueError, match="early"), start_up():
        raise ValueError("early")
    assert gc.isenabled()


def test_it_is_left_alone_where_the_process_is_not_ours() -> None:
    frozen = gc.get_freeze_count()
    started()
    assert gc.isenabled()
    assert gc.get_freeze_count() <= frozen  # some may be let go meanwhile
    gc.disable()
    try:
        with start_up():
            started()
        assert not gc.isenabled()
    finally:
        gc.enable()
