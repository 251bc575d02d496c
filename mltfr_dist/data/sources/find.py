"""Paths, folders, patterns and zip files -> the data files in them, by their names alone."""

from __future__ import annotations

import glob
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from mltfr_dist.data.sources.inputs import Given, given_file
from mltfr_dist.errors import DataError

_NO_DATA = "Names that begin with _ or . and endings .crc are marks of other programs, no data."
_TABLES = {"_delta_log": "Delta Lake", ".hoodie": "Hudi"}


def find_files(source: str, output: Path, log: Callable[[str], None]) -> list[Given]:
    """The data files of a path, a folder, a pattern, or an archive, in the order of their names.

    Args:
        source: as the user typed it; no URL and no stream.
        output: where prepared data goes, which must not be read.
        log: told of files that are left out.

    Raises:
        DataError: nothing is there, or it is of a kind that would be read wrongly.
    """
    path = Path(source)
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise DataError(f"`{source}` is no path: {error}.", remedy="Correct it.") from None
    if exists:
        files = _folder(path, output, log) if path.is_dir() else [path]
    elif (archive := _archive_of(path)) is not None:
        return _members(archive, str(archive), path.relative_to(archive).as_posix())
    elif glob.has_magic(source):
        files = _matches(source, output, log)
    else:
        raise DataError(
            f"There is no file {source}.",
            remedy="Give the path of a data file, a folder, a pattern, a URL, or a set that "
            "`mltfr fetch` lists.",
        )
    return [given for file in files for given in files_in(file, str(file))]


def files_in(path: Path, name: str) -> list[Given]:
    """The file itself, or the data files of a zip file.

    Raises:
        DataError: it is an archive of another kind, or one of files of several endings.
    """
    return _members(path, name) if name.lower().endswith(".zip") else [given_file(path, name)]


# --- folders and patterns -------------------------------------------------------------------------


def is_mark(name: str) -> bool:
    """Whether a file or folder of this name marks something for another program, and is no data."""
    if name in (".", ".."):
        return False
    return name.startswith(("_", ".")) or name.lower().endswith(".crc")


def _say_left_out(source: str, names: Sequence[str], log: Callable[[str], None]) -> None:
    if names:
        more = ", ..." if len(names) > 3 else ""
        log(f"{source}: {len(names)} left out ({', '.join(names[:3])}{more}). {_NO_DATA}")


def _folder(folder: Path, output: Path, log: Callable[[str], None]) -> list[Path]:
    """All data files below ``folder``, by the parts of their paths."""
    if output.resolve().is_relative_to(folder.resolve()):
        raise DataError(
            f"The output {output} lies in {folder}, which is read.",
            rule="A source must not hold what is made of it.",
            remedy="Give an output beside the folder.",
        )
    files: list[Path] = []
    left_out: list[str] = []
    above: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=_unreadable):
        real = os.path.realpath(root)
        if real in above:
            raise DataError(
                f"{root} leads to a folder that is read already ({real}).",
                rule="Each row of a source counts once.",
                remedy="Remove that link, or name the folders to read.",
            )
        above.add(real)
        left_out += [name for name in (*names, *folders) if is_mark(name)]
        folders[:] = sorted(name for name in folders if not is_mark(name))
        files += [Path(root, name) for name in names if not is_mark(name)]
    _say_left_out(str(folder), sorted(left_out), log)
    _refuse_tables([*files, folder / "_"])
    if not files:
        raise DataError(
            f"The folder {folder} holds no data files.",
            rule=_NO_DATA,
            remedy="Give another folder.",
        )
    return sorted(files, key=lambda path: path.parts)


def _unreadable(error: OSError) -> None:
    raise DataError(
        f"The folder {error.filename} cannot be read: {error.strerror}.",
        remedy="Give yourself the right to read it.",
    )


def _refuse_tables(paths: Iterable[Path]) -> None:
    """Refuse folders whose files count only as a log beside them says, and unfinished ones."""
    for folder in dict.fromkeys(above for path in paths for above in path.absolute().parents):
        kinds = [kind for name, kind in _TABLES.items() if (folder / name).is_dir()]
        if any((folder / "metadata").glob("*.metadata.json")):
            kinds.append("Iceberg")
        if kinds:
            raise DataError(
                f"{folder} is a table of {kinds[0]}.",
                rule="Its folder also holds files of rows that were deleted or replaced.",
                remedy="Export the table as Parquet or CSV, and prepare that.",
            )
        if (folder / "_temporary").is_dir():
            raise DataError(
                f"{folder} holds _temporary: the job that writes it has not finished.",
                remedy="Wait for that job, or write the folder again.",
            )


def _matches(pattern: str, output: Path, log: Callable[[str], None]) -> list[Path]:
    """The data files that match, in the order of names; `**` also goes into folders of folders."""
    files: dict[Path, None] = {}
    left_out: list[str] = []
    asked_for = set(pattern.split("/"))
    wants_marks = any(is_mark(name) and glob.has_magic(name) for name in asked_for)
    for match in sorted(glob.glob(pattern, recursive=True)):  # noqa: PTH207, may be absolute
        path = Path(match)
        marks = [name for name in path.parts if is_mark(name) and name not in asked_for]
        if marks and not wants_marks:
            left_out += [match] if path.is_file() else []
        elif not path.is_dir():
            files[path] = None
        elif "**" not in pattern:
            files |= dict.fromkeys(_folder(path, output, log))
    _say_left_out(pattern, left_out, log)
    if not files:
        raise DataError(
            f"Nothing matches {pattern}.",
            remedy="Correct the pattern, or quote it if the shell cut it.",
        )
    _refuse_tables(files)
    return list(files)


# --- archives -------------------------------------------------------------------------------------


def _archive_of(path: Path) -> Path | None:
    """The zip file that ``path`` leads into: `set.zip/ratings.csv`."""
    zips = (above for above in path.parents if above.suffix.lower() == ".zip")
    return next((above for above in zips if above.is_file()), None)


def _members(archive: Path, called: str, pattern: str | None = None) -> list[Given]:
    """The data files of a zip file: those that match, or all, which must then be of one ending."""
    try:
        with zipfile.ZipFile(archive) as opened:
            infos = [info for info in opened.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        raise DataError(
            f"{called} is damaged, or no zip file: {error}.",
            remedy="Fetch or copy it again.",
        ) from None
    names = [info.filename for info in infos]
    if len(set(names)) < len(names):
        raise DataError(
            f"{called} holds two files of one name.", remedy="Unpack it, and give the right one."
        )
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    if pattern is None:
        names = [name for name in names if not any(map(is_mark, name.split("/")))]
        names = [name for name in names if not name.startswith("__MACOSX/")]
    else:
        names = [name for name in names if name == pattern] or [
            name for name in names if fnmatchcase(name, pattern)
        ]
    files = [given_file(archive, f"{called}: {name}", name) for name in sorted(names)]
    if not files or (pattern is None and len({file.ending for file in files}) > 1):
        what = "holds no data files" if pattern is None else f"holds no {pattern}"
        what = what if not files else "holds files of several endings"
        raise DataError(
            f"{called} {what}; it holds {shown or 'nothing'}.",
            rule="Of a zip file, all data files are read, which must be of one ending.",
            remedy=f"Name what to read: `{called}/{(infos[0].filename if infos else 'FILE')}`.",
        )
    chosen = {file.member for file in files}
    if any(info.flag_bits & 1 for info in infos if info.filename in chosen):
        raise DataError(f"{called} is encrypted.", remedy="Unpack it first.")
    return files
