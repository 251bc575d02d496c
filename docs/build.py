"""Put the pages of the documentation together and build the site: `make docs`.

The pages stay where people read them in the repository (README.md, docs/, CONTRIBUTING.md); a copy
of them, with a page of reference for each room of the package, is what mkdocs reads. A warning is
an error: a link that leads nowhere, a docstring that names a parameter that is not there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mltfr_dist"
STAGING = ROOT / ".site" / "pages"
"""What mkdocs reads; named in mkdocs.yml."""

SITE = ROOT / ".site" / "html"
"""What it writes."""

PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE")
QUIET = {"NO_MKDOCS_2_WARNING": "1"}
"""The theme otherwise announces its successor at every build."""

FOLDERS = ("docs", "slurm", "ds_configs", "tuning/spaces")
"""Folders whose files pages link to."""


def modules(room: Path) -> list[str]:
    """Dotted names of a room's public modules, the room itself first."""
    files = [room] if room.suffix else sorted(room.rglob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    names = [name.removesuffix(".__init__") for name in names]
    return [name for name in names if "._" not in name and not name.endswith("__main__")]


def write_reference(target: Path) -> None:
    """A page for each folder and file right under the package."""
    target.mkdir(parents=True)
    index = ["# Reference", "", "From the docstrings, room by room.", ""]
    for room in sorted(PACKAGE.iterdir()):
        is_room = (room / "__init__.py").exists() or room.suffix == ".py"
        if not is_room or room.name.startswith("__"):
            continue
        sections = [f"## {name}\n\n::: {name}\n" for name in modules(room)]
        page = f"# {room.stem}\n\n" + "\n".join(sections)
        (target / f"{room.stem}.md").write_text(page)
        index.append(f"- [{room.stem}]({room.stem}.md)")
    (target / "index.md").write_text("\n".join(index) + "\n")


def stage() -> None:
    """Copy the pages and write the reference."""
    shutil.rmtree(STAGING, ignore_errors=True)
    STAGING.mkdir(parents=True)
    for name in PAGES:
        shutil.copy(ROOT / name, STAGING / name)
    for name in FOLDERS:
        shutil.copytree(
            ROOT / name, STAGING / name, ignore=shutil.ignore_patterns("*.py", "mkdocs.yml")
        )
    write_reference(STAGING / "reference")


def drop_roles() -> None:
    """Docstrings say :class:`Name`, which Markdown would show as it stands."""
    for page in (SITE / "reference").glob("*.html"):
        page.write_text(
            re.sub(r":(class|func|data|mod|meth|attr):(?=<code>)", "", page.read_text())
        )


def main() -> int:
    """Stage and build; returns mkdocs' exit code."""
    stage()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    command += ["--config-file", str(ROOT / "docs" / "mkdocs.yml")]
    code = subprocess.run(command, cwd=ROOT, env=os.environ | QUIET).returncode
    if not code:
        drop_roles()
    return code


if __name__ == "__main__":
    raise SystemExit(main())
