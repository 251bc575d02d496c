"""Object stores and other remote places, through fsspec: files are copied here, prepared, and copied there."""

from __future__ import annotations

import re
from pathlib import Path

import fsspec

from mltfr_dist.data.manifest import MANIFEST_NAME
from mltfr_dist.errors import DataError

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
"""What a URL may begin with: each only moves bytes. Chains (`a::b`) are none of it, nor is what runs a command."""
_URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):(?=//|[^/\\])")


def is_url(place: str) -> bool:
    """Whether ``place`` is a URL and not a path.

    Raises:
        DataError: a URL of a kind that is not read: `pipe:`, other commands, chains.
    """
    found = _URL.match(place)
    if not found or Path(place).exists():
        return False
    protocol = found[1].lower()
    if protocol not in PROTOCOLS or "::" in place:
        raise DataError(
            f"The address `{place}` is not of a kind that is read or written.",
            rule=f"URLs begin with {', '.join(PROTOCOLS)}; addresses that run a command (pipe:) or chain others are refused.",
            remedy="Give a path, a glob or such a URL.",
        )
    return True


def fetch(url: str, folder: Path) -> list[Path]:
    """Copy the file of a URL, or all files of a glob, into ``folder``; what is there with its whole size is not read again.

    Returns:
        the copies, in the order of their addresses.

    Raises:
        DataError: nothing is there, or it cannot be read.
    """
    try:
        system, path = fsspec.core.url_to_fs(url)
        addresses = sorted(system.glob(path)) if "*" in path or "?" in path else [path]
        copies = []
        for number, address in enumerate(addresses):
            # Numbered, since files of different folders may have one name; the name's end tells the format.
            copy = (
                folder
                / f"{number:05d}-{re.sub(r'[^A-Za-z0-9._-]', '_', address.rpartition('/')[2])}"
            )
            size = system.info(address)["size"]
            if not copy.is_file() or copy.stat().st_size != size:
                folder.mkdir(parents=True, exist_ok=True)
                system.get_file(address, str(copy))
            copies.append(copy)
    except (OSError, ImportError, ValueError) as error:
        raise _failed("read", url, error) from None
    if not copies:
        raise DataError(f"Nothing matches {url}.", remedy="Correct the address.")
    return copies


def manifest_at(url: str) -> bytes | None:
    """The manifest of a prepared folder at a URL, or None where there is none.

    Raises:
        DataError: the place cannot be read, or holds something else.
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
    """Copy all files of ``folder`` to a URL, the manifest last, so that a folder with a manifest is complete.

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
        remedy="Check the address and the credentials. Each kind of store needs its fsspec package (s3fs, gcsfs, ...).",
    )
