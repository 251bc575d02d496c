"""What `mltfr prepare` and `mltfr tables` are told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from mltfr_dist.schema import Count, Fraction, Options


class PrepareConfig(Options):
    """`mltfr prepare`: raw interactions to shards."""

    listed_by: ClassVar[str] = "mltfr prepare --help"

    format: Literal["auto", "csv", "tsv", "parquet", "jsonl", "sequences"] = Field(
        "auto",
        description="File format; auto goes by the ending. sequences: one `user item item ...` a line, oldest first.",
    )
    partitions: bool = Field(
        False,
        description="Whether folder names `key=value` are columns; otherwise they are only names.",
    )
    user_column: str = Field("user_id", description="Column that holds the user.")
    item_column: str = Field("item_id", description="Column that holds the item.")
    time_column: str = Field(
        "timestamp", description="Column that holds the time (number, date or date-time)."
    )
    times: Literal["checked", "any"] = Field(
        "checked",
        description="checked: times that look like moments (1985 to 2128, in seconds to nanoseconds) must have one unit and not "
        "lie in the future; any: numbers are only compared.",
    )
    titles: Path | None = Field(
        None, description="Table of item titles (csv, tsv, parquet or jsonl), shown by `recommend`."
    )
    titles_item_column: str = Field(
        "item_id", description="Column of --titles that holds the item."
    )
    titles_title_column: str = Field(
        "title", description="Column of --titles that holds the title."
    )
    duplicates: Literal["exact", "first", "keep"] = Field(
        "exact",
        description="exact: drop rows equal in user, item and time; first: keep a user's first row with an item; keep: keep all.",
    )
    user_core: Count = Field(
        5, description="k-core: interactions that every kept user has at least."
    )
    item_core: Count = Field(
        5, description="k-core: interactions that every kept item has at least."
    )
    split: Literal["leave_one_out", "global_temporal"] = Field(
        "leave_one_out",
        description="leave_one_out: a user's last item is test, the one before it validation. "
        "global_temporal: two points in time cut all users alike.",
    )
    valid_fraction: Fraction = Field(
        0.1, description="global_temporal: share of interactions in the validation period."
    )
    test_fraction: Fraction = Field(
        0.1, description="global_temporal: share of interactions in the test period."
    )
    sequences_per_block: Count = Field(4096, description="Sequences packed in one shard member.")
    sequences_per_shard: Count = Field(65536, description="Sequences in one shard file.")

    @model_validator(mode="after")
    def _leaves_training_data(self) -> PrepareConfig:
        if self.valid_fraction + self.test_fraction >= 1:
            given = f"{self.valid_fraction} + {self.test_fraction}"
            raise ValueError(
                "--valid-fraction and --test-fraction together must stay below 1, so that training "
                f"data remains (given: {given})"
            )
        return self


class PrepareResources(Options):
    """What `mltfr prepare` may use; none of it shows in the data."""

    listed_by: ClassVar[str] = "mltfr prepare --help"

    memory_limit: Annotated[str, Field(pattern=r"^\d+(\.\d+)? ?([KMGT]i?)?B$")] | None = Field(
        None,
        description="Memory for tables and sorting, as 4GB or 256MB; beyond it, disk is used. null: 60% of the machine's.",
    )
    threads: Count | None = Field(None, description="CPU threads; null: one a core.")
    temp_dir: Path | None = Field(
        None,
        description="Folder for what is kept on disk meanwhile, several times the source's size. null: beside the output.",
    )


class TableConfig(Options):
    """`mltfr tables`: a language model's input embeddings to a clean token table."""

    listed_by: ClassVar[str] = "mltfr tables --help"

    tensor: str | None = Field(
        None, description="Name of the embedding tensor; found from the checkpoint when not given."
    )
    vocabulary: Path | None = Field(
        None,
        description="File with the source's tokens, such as tokenizer.json or vocab.txt; found "
        "beside the source when not given.",
    )
    normalise: Literal["scale", "whiten", "none"] = Field(
        "scale",
        description="scale: centre the rows, divide by their root mean square; whiten: centre, then ZCA; none: raw values.",
    )
    keep_special: bool = Field(
        False,
        description="Keep special, unused and byte tokens, which carry no meaning of their own.",
    )
