"""The collector of garbage rests while a process of ours starts, and works afterwards; what a run
has no use for is not imported.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import REPOSITORY, clean_environment

from mltfr_dist.config import OptimizerConfig
from mltfr_dist.distributed.compiler import at_first_call, step_of
from mltfr_dist.optim import build_optimizer
from mltfr_dist.optimizers import OPTIMIZERS
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


ALONE = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from support import tiny_config
from mltfr_dist.training.running.fit import fit
for stage in {stages!r}:
    file = Path({repository!r}) / "ds_configs" / f"{{stage}}.json"
    fit(tiny_config(Path({folder!r}), name=stage, deepspeed=str(file), training__epochs=1),
        read_test=False)
print(*sys.modules)
"""


def test_a_run_imports_no_compiler_and_no_plots(tmp_path: Path) -> None:
    """Each takes a second or more before the first step. A report may draw at its end."""
    code = ALONE.format(
        tests=str(REPOSITORY / "tests"),
        stages=("zero0", "zero1", "zero2"),  # zero3 imports the compiler itself
        repository=str(REPOSITORY),
        folder=str(tmp_path),
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean_environment(DS_ACCELERATOR="cpu"),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = set(done.stdout.splitlines()[-1].split())
    assert "deepspeed" in found
    assert not found & {"torch._dynamo", "sympy", "matplotlib", "scipy.stats", "torch._inductor"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_without_the_compiler_is_the_optimizers(name: str) -> None:
    def trained(bare: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        optimizer = build_optimizer(model, OptimizerConfig(name=name), fused=False)
        step = step_of(optimizer) if bare else optimizer.step
        for _ in range(3):
            model(torch.randn(5, 4)).square().sum().backward()
            step(None)
            optimizer.zero_grad()
        return model.weight.detach()

    assert torch.equal(trained(bare=True), trained(bare=False))


def test_a_function_is_compiled_once_it_is_called() -> None:
    made = []

    def decorator(function: Callable[[int], int]) -> Callable[[int], int]:
        made.append(function)
        return lambda x: function(x) + 1

    @at_first_call(lambda: decorator)
    def double(x: int) -> int:
        return 2 * x

    assert not made
    assert [double(2), double(3)] == [5, 7]
    assert len(made) == 1
