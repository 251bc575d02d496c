"""Speed of a peer's own loader for training SASRec; run by stream_speed.py in that peer's
environment.

# [n, 51] item ids; prints JSON
python -I benchmarks/peer_loaders.py {recbole,rectools} SEQUENCES.npy BATCH_SIZE

Only the iteration of the loader is timed, over its second epoch; what the peer does before
(reading, sorting, filtering, and RecBole's expansion) is not. A sample of RecTools is a sequence:
50 inputs, each with its target. A sample of RecBole is a prefix of a sequence with one target
behind it: a sequence of 51 items makes 50 samples, the last two of which are held out.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

LENGTH = 50


def table(sequences: np.ndarray) -> dict[str, np.ndarray]:
    """Interactions of users 0.. at times 0.., in order."""
    users, times = (index.ravel() for index in np.indices(sequences.shape))
    return {"user_id": users, "item_id": sequences.ravel(), "timestamp": times}


def recbole_loader(sequences: np.ndarray, batch_size: int) -> Iterable[Any]:
    """Its TrainDataLoader for SASRec with cross-entropy (no negatives)."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation

    with TemporaryDirectory() as folder:
        path = Path(folder) / "random" / "random.inter"
        path.parent.mkdir()
        columns = table(sequences)
        header = "\t".join(
            f"{name}:{'float' if name == 'timestamp' else 'token'}" for name in columns
        )
        np.savetxt(
            path, np.stack(list(columns.values()), axis=1), "%d", "\t", header=header, comments=""
        )
        settings = {
            "data_path": folder,
            "checkpoint_dir": folder,
            "load_col": {"inter": list(columns)},
            "MAX_ITEM_LIST_LENGTH": LENGTH,
            "train_batch_size": batch_size,
            "train_neg_sample_args": None,
            "use_gpu": False,
        }
        config = Config(model="SASRec", dataset="random", config_dict=settings)
        train, *_ = data_preparation(config, create_dataset(config))
    return train


def rectools_loader(sequences: np.ndarray, batch_size: int) -> Iterable[Any]:
    """The train loader of its SASRec data preparator, as its SASRecModel makes it for softmax loss
    (no negatives).
    """
    import pandas
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models.nn.transformers.sasrec import SASRecDataPreparator

    columns = table(sequences)
    interactions = pandas.DataFrame(
        {Columns.User: columns["user_id"], Columns.Item: columns["item_id"], Columns.Weight: 1.0}
    )
    interactions[Columns.Datetime] = pandas.to_datetime(columns["timestamp"], unit="s")
    preparator = SASRecDataPreparator(
        session_max_len=LENGTH, batch_size=batch_size, dataloader_num_workers=0
    )
    preparator.process_dataset_train(Dataset.construct(interactions))
    return preparator.get_dataloader_train()


def main() -> None:
    """Command line."""
    peer, path, batch_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
    del sys.argv[1:]  # RecBole reads it
    torch.set_num_threads(1)
    sequences = np.load(path, allow_pickle=False)
    loader, key = {"recbole": (recbole_loader, "item_id"), "rectools": (rectools_loader, "x")}[peer]
    batches = loader(sequences, batch_size)
    for _ in range(2):
        wall, processor = time.perf_counter(), time.process_time()
        samples = sum(len(batch[key]) for batch in batches)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
    print(json.dumps({"samples": samples, "wall": wall, "processor": processor}))


if __name__ == "__main__":
    main()
