import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # tests/support.py

import pytest
from support import missing_for_nodes, missing_for_slurm


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which tests this machine cannot run, even where they are not selected."""
    for reason in filter(None, (missing_for_slurm(), missing_for_nodes())):
        terminalreporter.write_line(f"tests that this machine skips: {reason}")
