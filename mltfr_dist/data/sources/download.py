"""One file over HTTPS: what was cut off goes on, and only what is whole is handed over."""

from __future__ import annotations

import fcntl
import http.client
import json
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from mltfr_dist.errors import DataError
from mltfr_dist.files import write_atomically
from mltfr_dist.progress import duration

Log = Callable[[str], None]
_ATTEMPTS, _FIRST_WAIT, _TIMEOUT = 5, 1.0, 60.0
_SECONDS_BETWEEN_LINES = 5.0
_BLOCK_BYTES = 1 << 18
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Answers that another attempt may better."""


class _CutOffError(OSError):
    """The connection ended before the file did."""


def download(
    url: str, target: Path, *, has_checksum: bool, log: Log, allow_loopback: bool = False
) -> Path:
    """Fetch ``url`` into a file beside ``target``, which the caller verifies and renames.

    What an earlier call left there is gone on with, if the server says that the file is still the
    same, or if a checksum will tell at the end.

    Args:
        url: begins with https.
        target: where the file shall be.
        has_checksum: whether the caller knows one.
        log: takes lines of progress.
        allow_loopback: also http, from this machine (for tests).

    Returns:
        the whole file, as the server has it.

    Raises:
        DataError: it cannot be had, or there is no room for it.
    """
    partial = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(partial) as file, _nothing_empty_stays(partial):
            opener = urllib.request.build_opener(_Redirects(allow_loopback))
            _check_address(url, allow_loopback)
            for attempt in range(_ATTEMPTS):
                try:
                    _receive(opener, url, file, partial, has_checksum, log)
                    return partial
                except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                    reason = _reason(error)
                    if not _may_pass(error) or attempt == _ATTEMPTS - 1:
                        raise _failed(url, reason, partial) from None
                wait = _FIRST_WAIT * 2**attempt
                log(f"Cut off after {_size(partial)}: {reason}. On again in {wait:g} s.")
                time.sleep(wait)
    except OSError as error:  # of this machine's disk
        raise DataError(
            f"{target.parent} cannot be written: {error.strerror}.",
            remedy="Give another folder, or free disk there.",
        ) from None
    raise AssertionError("unreachable")


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:,.1f} MB"


@contextmanager
def _exclusive(partial: Path) -> Iterator[IO[bytes]]:
    """The part that is there, open for more, for this process alone."""
    with partial.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"Another process is fetching {partial.name[1:-5]} into {partial.parent}.",
                remedy="Wait for it.",
            ) from None
        yield file


@contextmanager
def _nothing_empty_stays(partial: Path) -> Iterator[None]:
    """After a failure, remove a file without content and the folders that were made for it."""
    try:
        yield
    except DataError:
        if not partial.stat().st_size:
            partial.unlink()
            partial.with_name(f"{partial.name}.json").unlink(missing_ok=True)
            with suppress(OSError):  # they hold something else
                for folder in (partial.parent, partial.parent.parent):
                    folder.rmdir()
        raise


def _check_address(url: str, allow_loopback: bool) -> None:
    address = urlsplit(url)
    is_loopback = allow_loopback and address.scheme == "http" and address.hostname in _LOOPBACK
    if address.scheme != "https" and not is_loopback:
        raise DataError(
            f"{url} is not fetched, or led to.",
            rule="Sets come over https, whose other end is known.",
            remedy="Fetch the file yourself, and prepare it by its path.",
        )


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to addresses that may be fetched themselves."""

    def __init__(self, allow_loopback: bool) -> None:
        self._allow_loopback = allow_loopback

    def redirect_request(self, *arguments: Any) -> urllib.request.Request | None:
        """See the base class; the last argument is the new address."""
        _check_address(arguments[-1], self._allow_loopback)
        return super().redirect_request(*arguments)


def _receive(
    opener: urllib.request.OpenerDirector,
    url: str,
    file: IO[bytes],
    partial: Path,
    has_checksum: bool,
    log: Log,
) -> None:
    """One attempt: append what is missing, or begin anew."""
    state_path = partial.with_name(f"{partial.name}.json")
    state = json.loads(state_path.read_text()) if state_path.exists() else {}
    have = file.seek(0, 2)
    same = state.get("url") == url
    if have and not (same and (state.get("validator") or has_checksum)):
        have = _anew(file)
    headers = {"User-Agent": "mltfr_dist", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        headers |= {"If-Range": state["validator"]} if state.get("validator") else {}
    try:
        answer = opener.open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        _anew(file)  # what is there is longer than the file
        raise _CutOffError("the file on the server has changed") from None
    with answer:
        total = _total(answer, have)
        if answer.status == 206 and total is None:
            _anew(file)
            raise _CutOffError("the server sent another part than was asked for")
        if answer.status == 206:
            log(f"Going on behind {have / 1e6:,.1f} MB.")
        elif file.seek(0, 2):
            have = _anew(file)
            log("The server cannot go on where it was cut off: from the beginning.")
        tag = answer.headers.get("ETag", "")
        validator = tag if tag.startswith('"') else answer.headers.get("Last-Modified", "")
        write_atomically(state_path, json.dumps({"url": url, "validator": validator}))
        _check_room(partial.parent, (total or 0) - have)
        _copy(answer, file, total, log)
    state_path.unlink()


def _anew(file: IO[bytes]) -> int:
    file.truncate(0)
    return 0


def _total(answer: Any, have: int) -> int | None:
    """Bytes of the whole file, where the answer says so and fits to what is there."""
    if answer.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        return int(match[2]) if match and int(match[1]) == have else None
    length = answer.headers.get("Content-Length")
    return int(length) if length and length.isdigit() else None


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{needed / 1e9:,.2f} GB are to come, but {folder} has {free / 1e9:,.2f} GB left.",
            remedy="Free disk there, or give another folder.",
        )


def _copy(answer: Any, file: IO[bytes], total: int | None, log: Log) -> None:
    began, start = time.monotonic(), file.seek(0, 2)
    have, said = start, began
    while block := answer.read(_BLOCK_BYTES):
        _write(file, block)
        have += len(block)
        now = time.monotonic()
        if now - said >= _SECONDS_BETWEEN_LINES:
            said, rate = now, (have - start) / (now - began)
            of = f" of {total / 1e6:,.1f}" if total else ""
            left = f", about {duration((total - have) / rate)} left" if total else ""
            log(f"  {have / 1e6:,.1f}{of} MB, {rate / 1e6:.1f} MB/s{left}")
    if total is not None and have != total:
        raise _CutOffError(f"{have:,} of {total:,} bytes came")
    if total is None:
        log("The server does not say how long the file is; only its content can tell.")


def _write(file: IO[bytes], block: bytes) -> None:
    try:
        file.write(block)
        file.flush()
    except OSError as error:
        raise DataError(
            f"{file.name} cannot be written: {error.strerror}.",
            remedy="Free disk there, and start the same command again: it goes on.",
        ) from None


def _may_pass(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code in _PASSING
    # A certificate does not become right by asking again, nor a name known.
    return not isinstance(getattr(error, "reason", None), (ssl.SSLError, socket.gaierror))


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"it answers {error.code} ({error.reason})"
    return str(getattr(error, "reason", "") or error or type(error).__name__).rstrip(".")


def _failed(url: str, reason: str, partial: Path) -> DataError:
    kept = f" {_size(partial)} are kept." if partial.exists() and partial.stat().st_size else ""
    return DataError(
        f"{url} cannot be fetched: {reason}.{kept}",
        remedy="Check the network (proxies: https_proxy), and start the same command again; or "
        "fetch the file yourself, and prepare it by its path.",
    )
