"""slurm/*.sbatch as other clusters' users submit them, on a real Slurm of two virtual nodes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import REPOSITORY, missing_for_slurm
from test_slurm import Slurm, inputs, num_lines, slurm, written  # noqa: F401  # fixtures

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(bool(missing_for_slurm()), reason=missing_for_slurm()),
    pytest.mark.timeout(900),
]

PROBE = """
import json, os, sys
import torch
from mltfr_dist.distributed.meeting import leave, start_ranks
ranks = start_ranks()
names = ("LOCAL_RANK", "LOCAL_SIZE", "CUDA_VISIBLE_DEVICES", "UCX_NET_DEVICES", "WRAPPED")
print("PROBE", json.dumps({name: os.environ.get(name) for name in names} | {
    "ranks": ranks.world_size, "threads": torch.get_num_threads(),
    "cores": sorted(os.sched_getaffinity(0)), "folder": os.getcwd(), "arguments": sys.argv[1:],
}))
ranks.barrier()
leave()
"""

FROM_ANOTHER_JOB = {
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
    "SLURM_MEM_PER_NODE": "9999",
    "UCX_NET_DEVICES": "one:1,two:1",
}
"""What `sbatch` inherits where it is called in a session that another `srun` started; and a value
with a comma.
"""


@pytest.fixture(scope="module")
def probing(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A repository whose train.py only tells what it was given; its interpreter is started by a
    wrapper.
    """
    folder = tmp_path_factory.mktemp("a repository")
    shutil.copytree(REPOSITORY / "slurm", folder / "slurm")
    (folder / "train.py").write_text(PROBE)
    (folder / ".venv").symlink_to(sys.prefix)
    settings = (folder / "slurm" / "env.sh").read_text()
    wrapped = settings.replace("wrap=()", 'wrap=(env "WRAPPED=by this")')
    (folder / "slurm" / "env.sh").write_text(wrapped + f"export PYTHONPATH='{REPOSITORY}'\n")
    return folder


def submit(slurm: Slurm, probing: Path, launcher: str, *options: str) -> tuple[int, str, list[Any]]:  # noqa: F811
    """Submit from a folder that is not the repository; exit code, log, and what each rank was
    given.
    """
    folder = probing.with_name(f"submitted {launcher} {len(list(probing.parent.iterdir()))}")
    folder.mkdir()
    done = subprocess.run(
        ["sbatch", "--wait", *options, str(probing / "slurm" / "train.sbatch"), "--config", "a b"],
        env=slurm.environment | FROM_ANOTHER_JOB | {"LAUNCHER": launcher},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    log = "".join(path.read_text() for path in folder.glob("slurm-*.log"))
    ranks = sorted(folder.glob("slurm-logs/*/start0/rank*.log"))
    said = [path.read_text() for path in ranks]
    given = [json.loads(text.split("PROBE ")[1]) for text in said if "PROBE " in text]
    for each in given:
        assert each["folder"] == str(folder)
        assert each["arguments"] == ["--config", "a b"]
        assert each["WRAPPED"] == "by this"
        assert each["UCX_NET_DEVICES"] == "one:1,two:1"
    return done.returncode, log + "".join(said), given


def test_gpus_by_task_on_uneven_nodes(slurm: Slurm, probing: Path) -> None:  # noqa: F811
    options = ("--nodes=2", "--ntasks=3", "--ntasks-per-node=2", "--gpus-per-task=1")
    code, said, given = submit(slurm, probing, "srun", *options, "--mem-per-cpu=300")
    assert code == 0, said
    assert [each["ranks"] for each in given] == [3] * 3
    assert [each["LOCAL_RANK"] for each in given] == ["0", "1", "0"]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in given] == ["0,1", "0,1", "0"], (
        "each rank sees every GPU of its node, and takes the one of its number"
    )
    assert [each["cores"] for each in given] == [[0], [1], [0]], "the job's binding, not another's"
    code, said, given = submit(slurm, probing, "deepspeed", *options)
    assert (code, given) == (2, [])
    assert (
        "as many tasks on every node, and this job has 3 on 2 nodes: give --ntasks-per-node" in said
    )


def test_gpus_by_task_on_a_node_of_ones_own(slurm: Slurm, probing: Path) -> None:  # noqa: F811
    options = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-task=1", "--exclusive")
    code, said, given = submit(slurm, probing, "deepspeed", *options)
    assert code == 0, said
    assert [each["ranks"] for each in given] == [2, 2]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in given] == ["0,1", "0,1"]
    assert [(each["cores"], each["threads"]) for each in given] == [([0], 1), ([1], 1)]


def test_threads_follow_the_cores_of_a_task(slurm: Slurm, probing: Path) -> None:  # noqa: F811
    options = ("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=2", "--exclusive")
    code, said, given = submit(slurm, probing, "srun", *options)
    assert code == 0, said
    assert [(each["ranks"], each["cores"], each["threads"]) for each in given] == [(1, [0, 1], 2)]


def test_an_interface_that_is_not_there(slurm: Slurm, probing: Path) -> None:  # noqa: F811
    settings = probing / "slurm" / "env.sh"
    before = settings.read_text()
    settings.write_text(before + "export GLOO_SOCKET_IFNAME=ib7\n")
    code, said, given = submit(slurm, probing, "srun", "--nodes=1", "--ntasks-per-node=1")
    settings.write_text(before)
    assert (code, given) == (2, [])
    assert "GLOO_SOCKET_IFNAME=ib7: " in said


def processes(path: Path) -> str:
    """Processes that were given the configuration file."""
    return subprocess.run(["pgrep", "-f", str(path)], capture_output=True, text=True).stdout


def test_one_task_of_an_array_is_signalled_and_then_all_cancelled(
    slurm: Slurm,  # noqa: F811
    inputs: Path,  # noqa: F811
) -> None:
    """The array shares its number with its first task; the others do not stop with it, and none
    comes back.
    """
    config, path = written(inputs, "array", training__epochs=9999)
    text = path.read_text().replace("name: array", "name: array-%a")
    path.write_text(text)
    options = ("--parsable", "--array=0-1", "--nodes=1", "--ntasks-per-node=1")
    script = ("slurm/train.sbatch", "--config", str(path), "name=array-%a")
    array = slurm.command("sbatch", *options, *script).strip()
    runs = [config.model_copy(update={"name": f"array-{task}"}) for task in (0, 1)]
    slurm.wait("both train", lambda: all(num_lines(run) > 2 for run in runs))
    ids = {
        task: slurm.command("squeue", "--noheader", "--format=%A", f"--jobs={array}_{task}").strip()
        for task in (0, 1)
    }
    (shared,) = [task for task, job in ids.items() if job == array]
    slurm.command("scancel", "--batch", "--signal=USR1", f"{array}_{shared}")
    slurm.wait("it is requeued", lambda: "requeued" in slurm.log(ids[shared]))
    before = num_lines(runs[1 - shared])
    slurm.wait("the other trains on", lambda: num_lines(runs[1 - shared]) > before + 2)
    assert "asked to stop" not in slurm.log(ids[1 - shared])
    slurm.wait("it goes on", lambda: "going on" in slurm.rank_log(ids[shared], "start1"))
    slurm.command("scancel", array)
    slurm.wait("it is gone", lambda: not slurm.command("squeue", "--noheader"))
    assert processes(path) == ""
    assert "requeued" not in slurm.log(ids[1 - shared])
