"""One tensor of one safetensors file, read in blocks of rows."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mltfr_dist.errors import DataError
from mltfr_dist.files import unique_keys
from mltfr_dist.tables.checkpoints.source import refuse_pointer

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""Number formats of safetensors that are token embeddings as they stand."""

_COMPARED_ROWS = 256


def open_file(file: Path) -> Any:
    """The library's handle of a safetensors file; it compares every claimed size with the file.

    Raises:
        DataError: the file is missing, damaged or a git-lfs pointer.
    """
    try:
        refuse_pointer(file)
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{file} cannot be read as safetensors: {error}.",
            remedy="Fetch the file again; it is damaged.",
        ) from None


def refuse_repeated_names(file: Path) -> None:
    """Refuse a header that describes a tensor twice, of which the library takes the last.

    Args:
        file: one that the library has opened, so its header is as long as it says.

    Raises:
        DataError: it does.
    """
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        try:
            json.loads(opened.read(size), object_pairs_hook=unique_keys)
        except ValueError as error:
            raise DataError(
                f"{file} is damaged: in its header, {error}.",
                remedy="Fetch the file again; it is damaged.",
            ) from None


def tensor_names(file: Path) -> list[str]:
    """Names of all tensors of a file."""
    with open_file(file) as handle:
        return list(handle.keys())


def shapes(file: Path) -> list[tuple[str, list[int]]]:
    """Names and shapes of all tensors of a file."""
    with open_file(file) as handle:
        names = list(handle.keys())
        return [(name, handle.get_slice(name).get_shape()) for name in names]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor by name; nothing of its values is held.

    Attributes:
        shape: as stored. dtype: safetensors' name of the number format.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def find(cls, name: str, file: Path) -> StoredTensor:
        """Look ``name`` up in the header of ``file``.

        Raises:
            DataError: the file is missing, or does not hold the tensor.
        """
        if not file.is_file():
            raise DataError(
                f"{file} is missing, which holds {name} by the checkpoint's index.",
                remedy="Fetch that file.",
            )
        with open_file(file) as handle:
            refuse_repeated_names(file)
            if name not in handle.keys():  # noqa: SIM118 (not a dict)
                raise DataError(
                    f"{file} does not hold {name}, against the checkpoint's index.",
                    remedy="Fetch the checkpoint again.",
                )
            stored = handle.get_slice(name)
            return cls(name, file, tuple(stored.get_shape()), str(stored.get_dtype()))

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows [stop - start, ...] in the stored number format."""
        # A handle per block: pages of its mapping count as this process's memory until then.
        with open_file(self.file) as handle:
            rows: torch.Tensor = handle.get_slice(self.name)[start:stop].contiguous()
        return rows

    def rows_at(self, wanted: torch.Tensor) -> torch.Tensor:
        """The rows of the indices ``wanted`` [n]; those that lie together are read together."""
        order = torch.unique(wanted)  # sorted
        starts = [0, *(torch.nonzero(order.diff() != 1).flatten() + 1).tolist(), len(order)]
        with open_file(self.file) as handle:
            stored = handle.get_slice(self.name)
            blocks = [
                stored[int(order[start]) : int(order[stop - 1]) + 1]
                for start, stop in itertools.pairwise(starts)
            ]
            return torch.cat(blocks)[torch.searchsorted(order, wanted)]

    def whole(self) -> torch.Tensor:
        """All of it."""
        with open_file(self.file) as handle:
            tensor: torch.Tensor = handle.get_tensor(self.name)
        return tensor

    def equals(self, other: StoredTensor) -> bool:
        """Whether the two hold the same bytes in the same shape and number format."""
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return False
        if not self.shape:
            return bytes_of(self.whole()) == bytes_of(other.whole())
        return all(
            bytes_of(self.rows(start, start + _COMPARED_ROWS))
            == bytes_of(other.rows(start, start + _COMPARED_ROWS))
            for start in range(0, self.shape[0], _COMPARED_ROWS)
        )


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The values of a contiguous tensor as stored."""
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
