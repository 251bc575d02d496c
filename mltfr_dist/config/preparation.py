"""What `mltfr prepare` and `mltfr tables` are told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from mltfr_dist.schema import Count, Fraction, Options


class PrepareConfig(Options):
    """`mltfr prepare`: raw interactions to shards."""

    listed_by: ClassVar[str] = "prepare"

    format: str = Field(
        "auto",
        description="How the files are laid out: csv, tsv, parquet, jsonl, sequences or the name "
        "of a public set's format; help lists them all. auto goes by the ending.",
    )
    partitions: bool = Field(
        False,
        description="Whether folder names `key=value` are columns; otherwise they are only names.",
    )
    user_column: str = Field(
        "user_id", description="Column that holds the user; with --no-header its number, from 1."
    )
    item_column: str = Field("item_id", description="Column that holds the item.")
    time_column: str = Field(
        "timestamp", description="Column that holds the time (number, date or date-time)."
    )
    order: Literal["time", "file"] = Field(
        "time",
        description="file: there is no time; rows (or lists) are in order already, oldest first.",
    )
    time_format: str | None = Field(
        None,
        description="Pattern of the times, as %d/%m/%Y or %Y%m%d (strptime's). null: numbers, or "
        "dates that begin with a four-digit year.",
    )
    times: Literal["checked", "any"] = Field(
        "checked",
        description="checked: times that look like moments (1985 to 2128, in seconds to "
        "nanoseconds) must have one unit and not lie in the future, and dates must lie within "
        "these years; any: they are only compared.",
    )
    header: bool = Field(
        True,
        description="csv, tsv: the first line names the columns; --no-header: it is a row, and "
        "columns are named by number, from 1.",
    )
    delimiter: str | None = Field(
        None,
        description="csv, tsv: what stands between fields, one to four characters; \\t is a tab. "
        "null: a comma, in tsv a tab.",
    )
    quote: str | None = Field(
        None,
        description="csv, tsv: the character around fields that hold the delimiter; empty for "
        'none. null: ", in tsv none.',
    )
    encoding: Literal["utf-8", "latin-1"] = Field(
        "utf-8", description="csv, tsv: how bytes become characters."
    )
    skip_rows: Annotated[int, Field(ge=0)] = Field(
        0, description="csv, tsv: lines before the header (or the first row) that are not read."
    )
    null: tuple[str, ...] = Field(
        (), description="A value that means a missing one, as NA; may be given several times."
    )
    missing: Literal["refuse", "drop"] = Field(
        "refuse",
        description="Rows without a user, an item or a time: refuse names the first; drop leaves "
        "them out and says how many.",
    )
    ids: Literal["checked", "any"] = Field(
        "checked",
        description="checked: ids that mean nothing (None, NaN), are rounded (1e5), or differ from "
        "another only in blanks, leading zeros or invisible characters are refused; any: every "
        "text is an id.",
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
        description="exact: drop rows equal in user, item and time; first: keep a user's first row "
        "with an item; keep: keep all.",
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
    targets: Literal["next", "all"] = Field(
        "next",
        description="global_temporal: what is to be predicted of a user in a period: next, the "
        "first interaction; all, every item of it (one that comes again counts once).",
    )
    valid_fraction: Fraction = Field(
        0.1, description="global_temporal: share of interactions in the validation period."
    )
    test_fraction: Fraction = Field(
        0.1, description="global_temporal: share of interactions in the test period."
    )
    sequences_per_block: Count = Field(4096, description="Sequences packed in one shard member.")
    sequences_per_shard: Count = Field(65536, description="Sequences in one shard file.")

    @field_validator("delimiter", "quote")
    @classmethod
    def _is_separator(cls, value: str | None, info: ValidationInfo) -> str | None:
        """Backslash and t mean a tab; neither holds a line end, and a quote is one character."""
        value = "\t" if value == "\\t" else value
        longest, least = (4, 1) if info.field_name == "delimiter" else (1, 0)
        if value is not None and not (
            least <= len(value.encode()) <= longest and value.isprintable() | (value == "\t")
        ):
            raise ValueError(f"must be {least} to {longest} bytes of text without line ends")
        return value

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without ``targets`` where they are the next items: such data keeps its manifest's bytes,
        by which runs know it, and earlier releases read it.
        """
        values: dict[str, Any] = handler(self)
        return {k: v for k, v in values.items() if (k, v) != ("targets", "next")}

    @property
    def split_in_words(self) -> str:
        """The rule that a protocol names: figures of two rules are not comparable."""
        return self.split + ", all targets of a period" * (self.targets == "all")

    @model_validator(mode="after")
    def _has_periods(self) -> PrepareConfig:
        if self.targets == "all" and self.split != "global_temporal":
            raise ValueError(
                f"--targets all needs --split global_temporal: {self.split} holds out one item "
                "each for validation and test"
            )
        return self

    @model_validator(mode="after")
    def _leaves_training_data(self) -> PrepareConfig:
        if self.valid_fraction + self.test_fraction >= 1:
            given = f"{self.valid_fraction} + {self.test_fraction}"
            raise ValueError(
                "--valid-fraction and --test-fraction must stay below 1 together, so that training "
                "data remains "
                f"(given: {given})"
            )
        return self


class PrepareResources(Options):
    """What `mltfr prepare` may use; none of it shows in the data."""

    listed_by: ClassVar[str] = "prepare"

    memory_limit: Annotated[str, Field(pattern=r"^\d+(\.\d+)? ?([KMGT]i?)?B$")] | None = Field(
        None,
        description="Memory for tables and sorting, as 4GB or 256MB; beyond it, disk is used. "
        "null: 60% of the machine's.",
    )
    threads: Count | None = Field(None, description="CPU threads; null: one a core.")
    temp_dir: Path | None = Field(
        None,
        description="Folder for what is kept on disk meanwhile, several times the source's size. "
        "null: beside the output.",
    )


class TableConfig(Options):
    """`mltfr tables`: a language model's input embeddings to a clean token table."""

    listed_by: ClassVar[str] = "tables"

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
        description="scale: centre the rows, divide by their root mean square; whiten: centre, "
        "then ZCA; none: raw values.",
    )
    keep_special: bool = Field(
        False,
        description="Keep special, unused and byte tokens, which carry no meaning of their own.",
    )
