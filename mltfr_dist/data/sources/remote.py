"""Object stores and other remote addresses, through fsspec: files are copied here, prepared, and
copied there.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import fsspec

from mltfr_dist.data.shards.manifest import MANIFEST_NAME
from mltfr_dist.data.sources.find import is_mark
from mltfr_dist.errors import DataError
from mltfr_dist.files import replacing

PROTOCOLS = (
    "file",
    "memory",
    "s3",
    "s3a",
    "gs",
    "gcs",
    "az",
    "abfs",
    "abfss",
    "hdfs",
    "webhdfs",
    "http",
    "https",
    "hf",
)
"""What a URL may begin with: each only moves bytes. Chains (`a::b`) are none of it, nor is what
runs a command.
"""
_URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):(?=//|[^/\\])")


def is_url(address: str) -> bool:
    """Whether ``address`` is a URL and not a path.

    Raises:
        DataError: a URL of a kind that is not read: `pipe:`, other commands, chains.
    """
    match = _URL.match(address)
    if not match or Path(address).exists():
        return False
    protocol = match[1].lower()
    if protocol not in PROTOCOLS or "::" in address:
        raise DataError(
            f"The address `{address}` is not of a kind that is read or written.",
            rule=f"URLs begin with {', '.join(PROTOCOLS)}; addresses that run a command (pipe:) or "
            f"chain others are refused.",
            remedy="Give a path, a glob or such a URL.",
        )
    return True


def fetch(url: str, folder: Path) -> list[tuple[Path, str]]:
    """Copy the file of a URL, or all data files of a folder or pattern, into ``folder``.

    A copy that is there whole, of the same address and state, is not fetched again.

    Returns:
        the copies and their addresses, in the order of addresses.

    Raises:
        DataError: nothing is there, or it cannot be read.
    """
    try:
        system, path = fsspec.core.url_to_fs(url)
        copies = []
        for address in _addresses(system, path, url):
            size = system.info(address)["size"]
            # The name holds what it is a copy of; its end tells the format.
            state = f"{system.unstrip_protocol(address)} {system.ukey(address)}"
            tail = re.sub(r"[^A-Za-z0-9._-]", "_", address.rpartition("/")[2])
            copy = folder / f"{hashlib.sha256(state.encode()).hexdigest()[:16]}-{tail[-80:]}"
            if not copy.is_file() or copy.stat().st_size != size:
                folder.mkdir(parents=True, exist_ok=True)
                with replacing(copy) as partial:
                    system.get_file(address, str(partial))
                    if size is not None and partial.stat().st_size != size:
                        raise OSError(f"{address} did not arrive whole")
            copies.append((copy, system.unstrip_protocol(address)))
    except (OSError, ImportError, ValueError) as error:
        raise _failed("read", url, error) from None
    if not copies:
        raise DataError(f"Nothing matches {url}.", remedy="Correct the address.")
    return copies


def _addresses(system: Any, path: str, url: str) -> list[str]:
    """What there is to copy: a file, or the data files of a folder or pattern."""
    if "*" in path or "?" in path:
        matching, above = system.glob(path), path.split("*")[0].split("?")[0].rpartition("/")[0]
        matching = [address for address in matching if not system.isdir(address)]
    elif url.endswith("/") or (not url.lower().startswith("http") and system.isdir(path)):
        matching, above = system.find(path), path.rstrip("/")
    else:
        return [path]
    tables = ("/_delta_log/", "/.hoodie/")
    if any(mark in address for address in matching for mark in tables):
        raise DataError(
            f"{url} is a table of Delta Lake or Hudi.",
            rule="Its folder also holds files of rows that were deleted or replaced.",
            remedy="Export the table as Parquet or CSV, and prepare that.",
        )
    names = {address: address.removeprefix(above).split("/") for address in matching}
    return sorted(address for address in matching if not any(map(is_mark, names[address])))


def manifest_at(url: str) -> bytes | None:
    """The manifest of a prepared folder at a URL, or None where there is none.

    Raises:
        DataError: the address cannot be read, or holds something else.
    """
    try:
        system, path = fsspec.core.url_to_fs(url.rstrip("/"))
        if not system.exists(path) or not (names := system.ls(path, detail=False)):
            return None
        if system.exists(f"{path}/{MANIFEST_NAME}"):
            content: bytes = system.cat_file(f"{path}/{MANIFEST_NAME}")
            return content
    except (OSError, ImportError, ValueError) as error:
        raise _failed("read", url, error) from None
    if all(
        name.endswith((".tar", ".parquet")) for name in names
    ):  # an upload that was interrupted: the manifest comes last
        return None
    raise DataError(
        f"{url} holds something other than prepared data.",
        rule="Preparation writes into a new or empty folder and never overwrites.",
        remedy="Give another output, or empty this one.",
    )


def upload(folder: Path, url: str) -> None:
    """Copy all files of ``folder`` to a URL, the manifest last, so that a folder with a manifest is
    complete.

    Raises:
        DataError: it cannot be written, or arrives with another size.
    """
    try:
        system, path = fsspec.core.url_to_fs(url.rstrip("/"))
        system.makedirs(path, exist_ok=True)
        for file in sorted(
            folder.iterdir(), key=lambda file: (file.name == MANIFEST_NAME, file.name)
        ):
            target, size = f"{path}/{file.name}", file.stat().st_size
            system.put_file(str(file), target)
            if system.info(target)["size"] != size:
                raise OSError(f"{file.name} did not arrive whole")
    except (OSError, ImportError, ValueError) as error:
        raise _failed("written", url, error) from None


def _failed(verb: str, url: str, error: Exception) -> DataError:
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return DataError(
        f"{url} cannot be {verb}: {reason}.",
        remedy="Check the address and the credentials. Each kind of store needs its fsspec package "
        "(s3fs, gcsfs, ...).",
    )
