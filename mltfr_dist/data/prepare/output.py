"""Where preparation may write: what an output may hold before, and what must lie apart."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from mltfr_dist.config import PrepareResources
from mltfr_dist.data.shards.manifest import MANIFEST_NAME
from mltfr_dist.errors import DataError

_OWN = r"(train|valid|test)-[0-9]{6}\.tar|(items|users)\.parquet"
"""Files of a prepared folder that are there before its manifest is."""
_LONGEST_NAME = 255


def check_name(output: Path) -> None:
    """Whether a folder for what is half done may be named after ``output``.

    Raises:
        DataError: its name is too long for that.
    """
    name = f".{output.name}.partial"
    if len(name.encode()) > _LONGEST_NAME:
        raise DataError(
            f"The name of the output {output} is too long: {name} is needed while it is prepared.",
            rule=f"File systems allow {_LONGEST_NAME} bytes a name.",
            remedy="Give a shorter name.",
        )


def holds_data(output: Path) -> bool:
    """Whether ``output`` holds prepared data; False if absent, empty, or half prepared in itself.

    Raises:
        DataError: it holds something else, which is never overwritten, or leads nowhere.
    """
    if output.is_symlink() and not output.exists():
        raise DataError(
            f"{output} is a link to {output.readlink()}, which is not there.",
            rule="An output may be a link to a folder that exists.",
            remedy="Make that folder, or remove the link.",
        )
    if not output.exists():
        return False
    if (output / MANIFEST_NAME).is_file():
        return True
    names = {path.name for path in output.iterdir()} if output.is_dir() else {output.name}
    own = {path for path in names if re.fullmatch(_OWN, path)}
    partial = output / f".{output.resolve().name}.partial"
    if names - {"lost+found", partial.name} - (own if partial.exists() else set()):
        raise DataError(
            f"{output} exists and holds something other than prepared data.",
            rule="Preparation writes into a new or empty folder and never overwrites.",
            remedy="Give another output folder, or empty this one.",
        )
    return False


def check_apart(sources: Sequence[str], output: Path, resources: PrepareResources) -> None:
    """Whether what is written lies outside what is read, and what is temporary outside what stays.

    Raises:
        DataError: it does not.
    """
    temp_dir = resources.temp_dir
    outputs = {f"The output {output}": output}
    if temp_dir is not None:
        outputs[f"--temp-dir {temp_dir}"] = temp_dir
        if temp_dir.resolve().is_relative_to(output.resolve()):
            raise DataError(
                f"--temp-dir {temp_dir} lies in the output {output}.",
                rule="The output holds what was prepared and nothing else.",
                remedy="Give another --temp-dir.",
            )
    for (name, path), source in itertools.product(outputs.items(), sources):
        if Path(source).is_dir() and path.resolve().is_relative_to(Path(source).resolve()):
            raise DataError(
                f"{name} lies in the source {source}.",
                rule="What is written must not be read as interactions the next time.",
                remedy="Give a folder outside the source.",
            )
