"""Workers that are started before the trials that take them, on a real Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys, time
from pathlib import Path
from mltfr_dist.tuning.environment import LOOPBACK, set_environment
set_environment(LOOPBACK)
import ray
from mltfr_dist.tuning.early_workers import early_groups
from mltfr_dist.tuning.own_ray import start_own_ray

def free():
    return ray.available_resources().get("CPU", 0)

def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)

start_own_ray()
before, folder = free(), Path(sys.argv[1])
assert before >= 2
with early_groups({"CPU": 0.5}, 2, 2, folder) as (lost, kept):
    wait_until(lambda: free() == before - 2)
    ray.kill(lost.actors[1])
    assert lost.take() is None, "one of its workers is gone"
    wait_until(lambda: free() == before - 1)  # nor are the others kept
    metadata = kept.take()
    imported = ray.get(kept.actors[0].execute.remote(lambda: "deepspeed" in sys.modules))
    assert imported and len({data.pid for data in metadata}) == 2
    assert kept.take() is None, "another trial has them"
wait_until(lambda: free() == before)
assert not list(folder.iterdir())
print("done")
"""


def test_workers_are_taken_once_and_those_that_are_left_go(tmp_path: Path) -> None:
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "ray")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.stdout == "done\n", done.stderr[-3000:]
