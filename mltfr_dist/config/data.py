"""What is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mltfr_dist.schema import Count, Positive, Section


class DataConfig(Section):
    """What is trained on."""

    path: Path = Field(description="Folder written by `mltfr prepare` (it holds manifest.json).")
    max_len: Count = Field(
        50, description="Items of a history that the model sees, the most recent ones."
    )
    shuffle_shards: Count = Field(
        8,
        description="Shards whose sequences are shuffled together; the order of shards is shuffled "
        "too.",
    )
    long_histories: Literal["truncate", "windows"] = Field(
        "truncate",
        description="Training histories longer than max_len. truncate: only their most recent "
        "items; "
        "windows: cut into pieces of max_len positions, each a sample of its own, so that every "
        "item is a target.",
    )
    samples: Literal["histories", "prefixes"] = Field(
        "histories",
        description="histories: one sample a history, scored at every position; prefixes: one a "
        "target, the up to max_len items before it, scored at its last position alone (as "
        "fmlp_original, bsarec_original and linrec_original need). Samples are what a batch "
        "counts.",
    )
    length_pool: Count = Field(
        1,
        description="Global batches whose samples are sorted by length together, so that a batch "
        "holds histories of like "
        "length; the order of the batches is shuffled. 1: batches as they are drawn.",
    )
    last_batch: Literal["pad", "drop"] = Field(
        "pad",
        description="The last batch of an epoch where it is not full. pad: filled with rows of "
        "weight zero; "
        "drop: left out (other samples each epoch).",
    )
    num_workers: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Processes of a rank that make batches ahead of training; 0: made in turn by "
        "the rank itself.",
    )
    on_bad_shard: Literal["stop", "quarantine"] = Field(
        "stop",
        description="A shard that is missing or damaged. stop: an error; quarantine: every rank "
        "reads all shards when the run "
        "starts, and what any rank finds bad goes to left_out.",
    )
    left_out: tuple[str, ...] = Field(
        (),
        description="Shard files that are not read, of any split. Part of the run: it goes on only "
        "without the same ones.",
    )
    read_attempts: Count = Field(
        4,
        description="Times that a shard is read, 0.5 s, 1 s, 2 s, ... apart, before it is given "
        "up.",
    )
    read_timeout: Positive = Field(
        300.0, description="Seconds after which one attempt to read a shard has failed."
    )
