"""`python -m mltfr_dist.cli`: the `mltfr` command."""

from __future__ import annotations

import sys

from mltfr_dist.cli import main

sys.exit(main())
