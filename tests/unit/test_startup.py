"""A start is short: the collector of garbage rests, and nothing is imported that is not used."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import REPOSITORY, clean_environment, tiny_config

from mltfr_dist.distributed import compiler
from mltfr_dist.startup import start_up, started
from mltfr_dist.training.run_folder import dump_config


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


TRAINS = """
import sys
import train
code = train.main(["--config", sys.argv[1]])
left = {"torch._dynamo", "torch._inductor", "scipy.stats", "matplotlib"} & set(sys.modules)
print("loaded:", sorted(left))
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_loads_no_compiler(tmp_path: Path, optimizer: str) -> None:
    config = tiny_config(
        tmp_path, optimizer__name=optimizer, training__epochs=1, mltfr__enabled=False, baselines=()
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    command = [sys.executable, "-c", TRAINS, str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=clean_environment(), cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr
    # the report needs statistics and plots, once all is trained
    assert "loaded: ['matplotlib', 'scipy.stats']" in done.stdout


def test_an_optimizer_without_its_wrapper_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def stepped(plainly: bool) -> list[torch.Tensor]:
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 7))
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        step = compiler.plain_step(optimizer) if plainly else optimizer.step
        assert (step == optimizer.step) != plainly
        for _ in range(3):
            optimizer.zero_grad()
            weight.pow(2).sum().backward()
            step()
        return [weight.detach(), *optimizer.state[weight].values()]

    monkeypatch.setattr(compiler, "COMPILER", "a module that nobody has imported")
    assert all(map(torch.equal, stepped(True), stepped(False)))
