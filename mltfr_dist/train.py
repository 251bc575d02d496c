"""`mltfr train` for launchers that start a module: `torchrun -m mltfr_dist.train`,
`deepspeed --module mltfr_dist.train`.
"""

from __future__ import annotations

import sys

from mltfr_dist.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
