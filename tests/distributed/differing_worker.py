"""train.py whose rank 1 is as on a node that differs; started by a launcher.

Usage: differing_worker.py CONFIG PACKAGE FOLDER [OVERRIDE ...]: rank 1 imports mltfr_dist from
PACKAGE, runs in FOLDER and gets the overrides, MLTFR_GRAPHS=on in its environment; "-" leaves the
first two as they are.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    config, package, folder, *overrides = sys.argv[1:]
    other = os.environ["RANK"] == "1"
    if other and package != "-":
        sys.path.insert(0, package)
    if other and folder != "-":
        os.chdir(folder)
    if other and "MLTFR_GRAPHS=on" in overrides:
        overrides.remove("MLTFR_GRAPHS=on")
        os.environ["MLTFR_GRAPHS"] = "on"
    import train
    from mltfr_dist.distributed.meeting import leave

    leave(train.main(["--config", config, *(overrides if other else [])]))
