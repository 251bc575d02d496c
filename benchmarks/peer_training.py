"""A peer's own training loop of SASRec, a share of an epoch at a time; run by peers.py in that
peer's environment.

python -I benchmarks/peer_training.py {recbole,rectools} SEQUENCES.npz SETTINGS.json

It says "ready" once it is set up. At each line on standard input it then trains as many of an
epoch's batches as the settings say, by the peer's own code, and answers with one line of JSON. What
comes before (reading, and RecBole's expansion of sequences to prefixes) is not timed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

OUT = sys.stdout


def peak_gib() -> float:
    """Resident memory of this process at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20


def say(result: Any) -> None:
    """One line of JSON."""
    print(json.dumps(result), file=OUT, flush=True)


def asked() -> bool:
    """Wait for the next turn."""
    return bool(sys.stdin.readline())


class Turn:
    """One share of an epoch, from its first batch to its last update."""

    def __init__(self) -> None:
        self.samples = self.positions = self.batches = 0
        self.started = time.perf_counter()

    def add(self, samples: int, positions: int) -> None:
        """Count a batch."""
        self.samples, self.positions = self.samples + samples, self.positions + positions
        self.batches += 1

    def tell(self, epoch_batches: int) -> None:
        """Say what it took."""
        seconds = time.perf_counter() - self.started
        result = {"seconds": seconds, "batches": self.batches, "epoch_batches": epoch_batches}
        counts = {"samples": self.samples, "positions": self.positions}
        say(result | counts | {"peak_gib": peak_gib()})


def interactions(given: Any, which: str) -> dict[str, np.ndarray]:
    """Interactions in order: users 0.., items, times 0.. ."""
    items, offsets = given[f"{which}_items"], given[f"{which}_offsets"]
    lengths = np.diff(offsets)
    times = np.arange(len(items)) - np.repeat(offsets[:-1], lengths)
    users = np.repeat(np.arange(len(lengths)), lengths)
    return {"user_id": users, "item_id": items, "timestamp": times}


class Share:
    """The first batches of a loader's epoch, counted."""

    def __init__(self, loader: Any, count: int) -> None:
        self.loader, self.count, self.turn = loader, count, Turn()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        self.turn = Turn()
        for batch in islice(iter(self.loader), self.count):
            self.turn.add(len(batch), len(batch))  # one target each
            yield batch


def recbole(given: Any, settings: dict[str, Any], scratch: Path) -> None:
    """RecBole's Trainer; a sample is a prefix with one target, the last two items held out."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender import SASRec
    from recbole.trainer import Trainer

    path = scratch / "given" / "given.inter"
    path.parent.mkdir()
    columns = interactions(given, "whole")
    kinds = {"timestamp": "float"}
    header = "\t".join(f"{name}:{kinds.get(name, 'token')}" for name in columns)
    rows = np.stack(list(columns.values()), axis=1)
    np.savetxt(path, rows, "%d", "\t", header=header, comments="")
    values = {
        "data_path": str(scratch),
        "checkpoint_dir": str(scratch),
        "load_col": {"inter": list(columns)},
        "MAX_ITEM_LIST_LENGTH": settings["max_len"],
        "train_batch_size": settings["batch"],
        "train_neg_sample_args": None,
        "loss_type": "CE",
        "hidden_size": settings["dim"],
        "inner_size": 4 * settings["dim"],
        "n_layers": settings["layers"],
        "n_heads": settings["heads"],
        "use_gpu": False,
        "show_progress": False,
    }
    config = Config(model="SASRec", dataset="given", config_dict=values)
    train, *_ = data_preparation(config, create_dataset(config))
    trainer = Trainer(config, SASRec(config, train.dataset))
    whole, share = len(train), Share(train, max(1, round(len(train) * settings["share"])))
    say("ready")
    epoch = 0
    while asked():
        trainer._train_epoch(share, epoch, show_progress=False)
        share.turn.tell(whole)
        epoch += 1


def rectools(given: Any, settings: dict[str, Any], scratch: Path) -> None:
    """RecTools' SASRecModel under its Lightning trainer; a sample is a sequence, each of its
    positions scored.
    """
    import pandas
    from pytorch_lightning import Callback, Trainer
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    whole = -(-(len(given["train_offsets"]) - 1) // settings["batch"])  # batches of an epoch

    class Turns(Callback):
        """Waits before each epoch, which is a share of one."""

        def on_train_start(self, trainer: Any, *_: Any) -> None:
            say("ready")

        def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = not asked()
            self.turn = Turn()

        def on_train_batch_start(self, trainer: Any, _: Any, batch: Any, *__: Any) -> int | None:
            self.turn.add(len(batch["x"]), int((batch["yw"] != 0).sum()))
            return -1 if trainer.should_stop else None

        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            if not trainer.should_stop:
                self.turn.tell(whole)

    def trainer() -> Trainer:
        return Trainer(
            max_epochs=-1,
            limit_train_batches=max(1, round(settings["share"] * whole)),
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Turns()],
        )

    columns = interactions(given, "train")
    names = {Columns.User: columns["user_id"], Columns.Item: columns["item_id"]}
    table = pandas.DataFrame(names | {Columns.Weight: 1.0})
    table[Columns.Datetime] = pandas.to_datetime(columns["timestamp"], unit="s")
    model = SASRecModel(
        n_blocks=settings["layers"],
        n_heads=settings["heads"],
        n_factors=settings["dim"],
        session_max_len=settings["max_len"],
        batch_size=settings["batch"],
        loss="softmax",
        get_trainer_func=trainer,
    )
    model.fit(Dataset.construct(table))


def main() -> None:
    """Command line."""
    global OUT
    peer, path, settings = sys.argv[1], sys.argv[2], json.loads(Path(sys.argv[3]).read_text())
    del sys.argv[1:]  # RecBole reads it
    OUT, sys.stdout = sys.stdout, sys.stderr  # what peers print is no answer
    torch.set_num_threads(settings["threads"])
    train: dict[str, Callable[[Any, dict[str, Any], Path], None]]
    train = {"recbole": recbole, "rectools": rectools}
    with np.load(path, allow_pickle=False) as given, TemporaryDirectory() as scratch:
        train[peer](given, settings, Path(scratch))


if __name__ == "__main__":
    main()
