"""Other libraries that train SASRec, each in an environment of its own, in turns with this one.

Their pins conflict with this package's and with each other's. An environment is made once, in a
cache folder outside of the repository, and again where its pins have changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mltfr_dist.data.shards.manifest import load_manifest
from mltfr_dist.data.shards.packed import PackedSequences
from mltfr_dist.data.shards.reader import read_shard

TORCH = "torch==2.13.0"
RECBOLE = (
    "pandas==2.3.3 scipy scikit-learn tensorboard pyyaml texttable psutil tqdm colorlog==4.7.2 "
    "colorama==0.4.4 plotly tabulate"
)
INSTALL = {
    "rectools": [["rectools[torch]==0.19.0", TORCH]],
    "recbole": [  # in turn: together pip finds no solution
        [TORCH, "numpy<2", *RECBOLE.split()],
        ["setuptools<70", "numpy<2", "ray==2.6.3"],
        ["--no-deps", "recbole==1.2.1", "thop"],
    ],
}
"""Arguments of `pip install`, call by call."""


@dataclass
class Peer:
    """What a peer's turns came to."""

    name: str
    seconds: float
    """Of an epoch: that of the fastest turn, by its share of the batches."""
    timed: str
    """Which share was timed."""
    samples_s: float
    positions_s: float
    peak_gib: float
    """Resident memory of its process at most, everything included."""


def environment(name: str, cache: Path) -> Path:
    """The Python of the peer's environment, which is made where it is missing."""
    digest = hashlib.sha256(json.dumps([sys.version, INSTALL[name]]).encode()).hexdigest()
    place = cache.absolute() / name
    made, python = place / "made", place / "bin" / "python"
    if made.exists() and made.read_text() == digest:
        return python
    print(f"Installing {name} in {place} ...", file=sys.stderr, flush=True)
    shutil.rmtree(place, ignore_errors=True)
    commands = [[sys.executable, "-m", "venv", str(place)]]
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    commands += [[*pip, *packages] for packages in INSTALL[name]]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(
                f"`{' '.join(command)}` failed:\n{done.stderr[-3000:]}\n"
                f"Leave {name} out of --peers, or install by hand."
            )
    made.write_text(digest)
    return python


def write_sequences(data: Path, path: Path) -> None:
    """Training sequences of a prepared folder, and the whole ones, for peers that hold out the last
    two items themselves.
    """
    manifest, arrays = load_manifest(data), dict[str, np.ndarray]()
    for split, name in (("train", "train"), ("test", "whole")):
        shards = manifest.splits[split].shards
        read = (read_shard(data, info, num_items=manifest.num_items) for info in shards)
        sequences = PackedSequences.concatenate(list(read))
        arrays |= {f"{name}_items": sequences.items, f"{name}_offsets": sequences.offsets}
    np.savez(path, **arrays)


class Process:
    """A peer that waits for its turn."""

    def __init__(self, name: str, cache: Path, data: Path, settings: dict[str, Any]) -> None:
        """Args: settings: batch, max_len, dim, layers, heads, threads, and share of an epoch."""
        self.name, self.turns = name, list[dict[str, Any]]()
        self._scratch = tempfile.TemporaryDirectory()
        folder = Path(self._scratch.name)
        write_sequences(data, folder / "sequences.npz")
        (folder / "settings.json").write_text(json.dumps(settings))
        script = Path(__file__).with_name("peer_training.py")
        given = [str(folder / "sequences.npz"), str(folder / "settings.json")]
        command = [str(environment(name, cache)), "-I", str(script), name, *given]
        threads = {"OMP_NUM_THREADS": str(settings["threads"])}
        self._log = (folder / "log").open("w+")
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | threads,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        assert self._answer() == "ready"

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise SystemExit(f"{self.name} has ended:\n{self._log.read()[-3000:]}")
        return json.loads(line)

    def turn(self) -> None:
        """Let it train its share of an epoch."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self.turns.append(self._answer())

    def end(self) -> Peer:
        """Stop it; what it came to."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()
        self._scratch.cleanup()
        best = min(self.turns, key=lambda turn: turn["seconds"] / turn["batches"])
        return Peer(
            self.name,
            seconds=best["seconds"] * best["epoch_batches"] / best["batches"],
            timed=f"{best['batches']} of {best['epoch_batches']} batches",
            samples_s=best["samples"] / best["seconds"],
            positions_s=best["positions"] / best["seconds"],
            peak_gib=max(turn["peak_gib"] for turn in self.turns),
        )
