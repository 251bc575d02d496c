"""Where a run or sweep was started: relative paths of its configuration begin there, wherever a
command is typed.

`origin.json` beside the configuration holds that folder twice: as seen from the run's folder, so
that a whole project can be moved, and absolute, so that the run's folder alone can.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mltfr_dist.errors import DataError
from mltfr_dist.files import write_atomically

ORIGIN = "origin.json"
ABSOLUTE, RELATIVE = "started_in", "from_this_folder"

Values = dict[str, Any]
"""A configuration as nested mappings, paths as texts."""


def record_origin(folder: Path) -> None:
    """Note that what lies in ``folder`` was started in the working folder."""
    here = str(Path.cwd())
    noted = {ABSOLUTE: here, RELATIVE: os.path.relpath(here, folder)}
    text = json.dumps(noted, indent=2) + "\n"
    if not (folder / ORIGIN).exists() or (folder / ORIGIN).read_text() != text:
        write_atomically(folder / ORIGIN, text)


def origins(folder: Path) -> list[Path]:
    """Where relative paths of what lies in ``folder`` may begin, in the order in which they are
    tried.

    The place that is to the folder as the recorded one was, the recorded one, the working folder;
    where nothing is recorded, the working folder alone.
    """
    here = Path.cwd()
    try:
        noted = json.loads((folder / ORIGIN).read_text())
        beside = Path(os.path.normpath(folder.absolute() / noted[RELATIVE]))
        return list(dict.fromkeys([beside, Path(noted[ABSOLUTE]), here]))
    except (OSError, ValueError, LookupError, TypeError):
        return [here]


def located(values: Values, folder: Path) -> Values:
    """The configuration of what lies in ``folder``, its paths as they are found from the working
    folder.
    """
    begins = origins(folder)
    return _with_paths(values, lambda path: _locate(path, begins))


def check_located(values: Values, folder: Path) -> None:
    """Whether what the :func:`located` configuration of ``folder`` reads was found.

    Raises:
        DataError: Data or a table is at none of the places; only where there are several, for else
            whoever reads it says so.
    """
    begins = origins(folder)
    for path in _inputs(values) if len(begins) > 1 else ():
        if not Path(path).is_absolute() and not Path(path).exists():
            paths = ", nor ".join(str(begin / path) for begin in begins)
            raise DataError(
                f"{path}, which the run in {folder} reads, is not at {paths}.",
                rule="Relative paths of a run begin where it was started, as its "
                f"{ORIGIN} says, or else where a command is typed.",
                remedy="Put it back at one of these places.",
            )


def as_stored(given: Values, stored: Values, folder: Path) -> Values:
    """``given``, each path of it as in ``stored``, which lies in ``folder``, where both mean one
    place.
    """
    begins, same = origins(folder), dict.fromkeys(_paths(stored))
    meant = {os.path.realpath(_locate(path, begins)): path for path in same}
    return _with_paths(
        given, lambda path: path if path in same else meant.get(os.path.realpath(path), path)
    )


def _locate(path: str, begins: list[Path]) -> str:
    """``path`` as it is found from the working folder: unchanged where it is there, or nowhere."""
    begin = next((begin for begin in begins if (begin / path).exists()), Path.cwd())
    return path if begin == Path.cwd() else str(begin / path)


def _with_paths(values: Values, change: Callable[[str], str]) -> Values:
    """``values`` with every path changed."""
    changed = dict(values)
    for key in ("runs_dir", "deepspeed"):
        if isinstance(changed.get(key), str):
            changed[key] = change(changed[key])
    if isinstance(data := changed.get("data"), dict) and isinstance(data.get("path"), str):
        changed["data"] = data | {"path": change(data["path"])}
    if isinstance(mltfr := changed.get("mltfr"), dict) and isinstance(mltfr.get("tables"), list):
        changed["mltfr"] = mltfr | {"tables": [change(str(path)) for path in mltfr["tables"]]}
    return changed


def _paths(values: Values) -> list[str]:
    paths: list[str] = []

    def keep(path: str) -> str:
        paths.append(path)
        return path

    _with_paths(values, keep)
    return paths


def _inputs(values: Values) -> Iterator[str]:
    """Paths of what a run cannot do without."""
    yield values["data"]["path"]
    yield from values["mltfr"]["tables"] if values["mltfr"]["enabled"] else ()
