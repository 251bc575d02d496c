"""`mltfr fetch`: public sets by name, from where their owners offer them, verified."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from mltfr_dist.config import PrepareConfig
from mltfr_dist.data.sources.download import Log, download
from mltfr_dist.data.sources.public_sets import PUBLIC_SETS, PublicSet
from mltfr_dist.data.sources.read import NAMED_SETS
from mltfr_dist.errors import ConfigError, DataError
from mltfr_dist.files import file_sha256, write_atomically
from mltfr_dist.progress import say
from mltfr_dist.schema import changed, or_nearest

RECORD = "fetched.json"
"""In a set's folder: address, size and sha256 of what was fetched."""


def sets_text() -> str:
    """The sets, a line each."""
    lines = ["set                  checksum  what it is"]
    for name, public_set in PUBLIC_SETS.items():
        known = "known" if public_set.checksum else "first"
        about = (
            public_set.about
            if public_set.url
            else f"{public_set.about} (by hand: `mltfr fetch {name}`)"
        )
        lines.append(f"{name:<20} {known:<9} {about}")
    said = "checksum: known beforehand, or recorded by the first fetch and compared from then on."
    lines += ["", said]
    return "\n".join(lines)


def fetch_set(name: str, folder: Path, *, log: Log = say, allow_loopback: bool = False) -> Path:
    """Fetch a public set into ``folder/name``, unless it is there; its terms are shown first.

    Args:
        name: one of :data:`PUBLIC_SETS`.
        folder: of all sets.
        log: takes lines for the user.
        allow_loopback: see :func:`download`.

    Returns:
        the file, verified.

    Raises:
        DataError: there is no such set, it cannot be had, or is not what it was.
    """
    public_set = _set(name)
    log(f"{name}: {public_set.about}.")
    log(f"Terms: {public_set.terms}")
    if not public_set.url:
        raise DataError(
            f"The set `{name}` cannot be fetched by a program.",
            rule=public_set.terms,
            remedy=f"Then `mltfr prepare FILE OUTPUT{_options(public_set)}`.",
        )
    target = folder / name / public_set.file
    if target.is_file():
        _verify(target, target, public_set)
        log(f"{target} is here already, and verified.")
    else:
        log(f"From {public_set.url}")
        fetched = download(
            public_set.url,
            target,
            has_checksum=bool(public_set.checksum),
            log=log,
            allow_loopback=allow_loopback,
        )
        _verify(fetched, target, public_set)
        fetched.rename(target)
        log(f"{target}: {target.stat().st_size:,} bytes, {_how(public_set)}.")
    log(f"Prepare it: `mltfr prepare {_path(target, public_set)} OUTPUT{_options(public_set)}`")
    return target


def known_set(
    sources: Sequence[str],
    config: PrepareConfig,
    *,
    download: bool,
    folder: Path,
    log: Log = say,
) -> tuple[Sequence[str], PrepareConfig]:
    """What to prepare: a public set's files and format in place of its name, others as they are.

    Raises:
        ConfigError: the name is that of a path, too, or ``download`` is set for what is no set.
        DataError: as :func:`use_set`.
    """
    name = sources[0] if sources else ""
    is_set = len(sources) == 1 and name in PUBLIC_SETS
    if is_set and Path(name).exists():
        raise ConfigError(
            f"`{name}` is a public set, and a path here.",
            remedy=f"Give `./{name}` for the path, or work in another folder for the set.",
        )
    if download and not is_set:
        raise ConfigError(
            f"--download is given for {', '.join(sources)}, which is no public set"
            f"{or_nearest(name, PUBLIC_SETS)}.",
            remedy=f"The public sets are: {', '.join(PUBLIC_SETS)}.",
        )
    if not is_set or (name in NAMED_SETS and not download):
        return sources, config
    path, config = use_set(name, folder, config, download=download, log=log)
    return [path], config


def use_set(
    name: str, folder: Path, config: PrepareConfig, *, download: bool = False, log: Log = say
) -> tuple[str, PrepareConfig]:
    """The path to prepare of a public set, and the configuration with what it needs filled in.

    Raises:
        DataError: it is not there and may not be fetched, or as :func:`fetch_set`.
    """
    public_set = _set(name)
    target = folder / name / public_set.file
    if download or not public_set.url:
        fetch_set(name, folder, log=log)
    elif not target.is_file():
        raise DataError(
            f"The public set `{name}` is not here ({target}).",
            rule=public_set.terms,
            remedy="Add --download to fetch it, or `mltfr fetch` it first on a machine with a "
            "network.",
        )
    else:
        _verify(target, target, public_set)
    missing = {k: v for k, v in public_set.options.items() if k not in config.model_fields_set}
    if missing:
        log(f"{name}: prepared with{_options(public_set, missing)}")
    return _path(target, public_set), changed(config, missing, source=f"the public set {name}")


def _set(name: str) -> PublicSet:
    if name not in PUBLIC_SETS:
        raise DataError(
            f"There is no public set `{name}`{or_nearest(name, PUBLIC_SETS)}.",
            remedy=f"There are: {', '.join(PUBLIC_SETS)}.",
        )
    return PUBLIC_SETS[name]


def _path(target: Path, public_set: PublicSet) -> str:
    return f"{target}/{public_set.member}" if public_set.member else str(target)


def _options(public_set: PublicSet, chosen: dict[str, object] | None = None) -> str:
    """Its options as they are typed, each after a blank."""
    values = public_set.options if chosen is None else chosen
    return "".join(f" --{key.replace('_', '-')} {value}" for key, value in values.items())


def _how(public_set: PublicSet) -> str:
    return (
        f"as its known {public_set.checksum.partition(':')[0]} says"
        if public_set.checksum
        else f"no checksum of it is known: its sha256 is recorded in {RECORD}, for later fetches"
    )


def _verify(path: Path, target: Path, public_set: PublicSet) -> None:
    """Compare a file with the checksum that is known, and with what was fetched before.

    Raises:
        DataError: it is something else; a new one is kept apart.
    """
    record_path = target.with_name(RECORD)
    sha256 = file_sha256(path)
    wanted = {public_set.checksum} - {""}
    if record_path.is_file():
        record = json.loads(record_path.read_text())
        wanted |= {f"sha256:{record['sha256']}"} if record["url"] == public_set.url else set()
    have = {f"sha256:{sha256}", *(f"md5:{_md5(path)}" for w in wanted if w.startswith("md5:"))}
    if not wanted <= have:
        kept = path
        if path != target:
            kept = target.with_name(f"{target.name}.rejected")
            path.rename(kept)
        other = ", ".join(sorted(wanted - have))
        raise DataError(
            f"What is at {kept} is not the set that is known: its sha256 is {sha256}, but {other} "
            "was expected.",
            rule="A set is used only as it is known, or as it was first fetched.",
            remedy="Fetch again, without that file; if its owners have changed the set, look at "
            f"it, and prepare it by its "
            f"path{'' if public_set.checksum else f', or remove {record_path}'}.",
        )
    values = {"url": public_set.url, "bytes": path.stat().st_size, "sha256": sha256}
    write_atomically(record_path, json.dumps(values, indent=2) + "\n")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
