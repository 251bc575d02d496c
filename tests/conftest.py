import atexit
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # tests/support.py

import pytest
from support import missing_for_nodes, missing_for_slurm

from mltfr_dist.distributed.meeting import SINGLE_PROCESS

atexit.register(gc.unfreeze)


CLUSTERS = ("tests/slurm", "tests/distributed/test_sweep", "tests/distributed/test_nodes")


@pytest.hookimpl(optionalhook=True)  # also where tests run without xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """How `-n 2 --dist loadfile` divides tests: a file's follow each other in one process, and
    those that start Ray, Slurm or hosts of their own all in one, so that no two clusters meet.
    """
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "clusters" if file.startswith(CLUSTERS) else file

    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which tests this machine cannot run, even where they are not selected."""
    for reason in filter(None, (missing_for_slurm(), missing_for_nodes())):
        terminalreporter.write_line(f"tests that this machine skips: {reason}")


@pytest.fixture(autouse=True, scope="module")
def _no_variables_of_ranks_stay() -> Iterator[None]:
    """What a run in this process set is gone for the next file, whose tests may start processes.

    What was imported by now is no garbage: it is not looked through each time.
    """
    gc.collect()
    gc.freeze()
    before = {name: os.environ.get(name) for name in SINGLE_PROCESS}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
