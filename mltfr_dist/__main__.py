"""`python -m mltfr_dist`: the `mltfr` command."""

from __future__ import annotations

import sys

from mltfr_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
