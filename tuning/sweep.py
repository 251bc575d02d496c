"""Search a space: `python tuning/sweep.py tuning/spaces/demo.yaml`; the same as `mltfr sweep`.
Start it again and it goes on.
"""

from __future__ import annotations

import sys

from mltfr_dist.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
