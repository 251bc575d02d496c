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


def pytest_itemcollected(item: pytest.Item) -> None:
    """For `--dist loadgroup`: a file's tests follow each other in one process, and those that start
    Ray, Slurm or hosts of their own all in one, so that no two clusters meet.
    """
    file = item.nodeid.partition("::")[0]
    group = "clusters" if file.startswith(CLUSTERS) else file
    item.add_marker(pytest.mark.xdist_group(group))


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
