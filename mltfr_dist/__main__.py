"""`python -m mltfr_dist`: the `mltfr` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mltfr_dist.distributed.signals import ended_by_signals


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code. Ctrl-C while it is imported leaves no traceback."""
    with ended_by_signals():
        from mltfr_dist.cli import main as run_command

        return run_command(arguments)


if __name__ == "__main__":
    sys.exit(main())
