"""What was typed to start this process, for messages that name a command to type next."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path


def command(name: str = "") -> str:
    """A command such as `mltfr sweep`, by the program that runs here; without a launcher.

    train.py, and the package's module `train`, are the command `train` themselves.
    """
    started = _started()
    if started.rstrip("'").endswith((".train", "train.py")):
        return f"python {started}" if name in ("", "train") else f"mltfr {name}"
    return f"{f'python {started}' if started else 'mltfr'} {name}".rstrip()


def train_command() -> str:
    """What starts a run: as it was typed, with its launcher; or `mltfr train`, where it was not."""
    plain, launcher = command("train"), launched_by()
    if not launcher or plain.startswith("mltfr"):
        return plain
    if launcher == "deepspeed":
        plain = plain.replace(" -m ", " --module ", 1)
    return plain.replace("python", launcher, 1)


def launched_by() -> str:
    """`torchrun`, `deepspeed`, or nothing: the launcher of this process."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    return "deepspeed" if "CROSS_SIZE" in os.environ else ""


def is_rank() -> bool:
    """Whether a launcher may have started several of this process."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def is_first() -> bool:
    """Whether this process prints what all ranks would."""
    return not is_rank() or os.environ["RANK"] == "0"


def _started() -> str:
    """`-m MODULE` of this package, or the path of train.py; nothing for all others."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name.partition(".")[0] == __name__.partition(".")[0]:
        return f"-m {spec.name.removesuffix('.__main__')}"
    return shlex.quote(sys.argv[0]) if Path(sys.argv[0]).name == "train.py" else ""
