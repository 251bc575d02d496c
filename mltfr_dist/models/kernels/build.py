"""Builds the kernels at their first use and keeps them; a machine that cannot takes the plain path.

Only a C++ compiler is needed: the kernels read memory alone and include nothing of torch, so that
they compile in seconds and fit every release of it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

SOURCES = (
    *("common.h", "panels.h", "registers.h", "rounded.h"),
    *("attention.cpp", "counting.cpp", "leading.cpp", "products.cpp", "search.cpp"),
)
FLAGS = (
    *("-O3", "-std=c++17", "-mavx2", "-mfma", "-fno-math-errno", "-fno-trapping-math"),
    *("-shared", "-fPIC", "-pthread"),
)
SWITCH = "MLTFR_KERNELS"
"""Environment variable: `off` takes the plain path."""
COMPILE_SECONDS = 300


class CannotBuildError(Exception):
    """Why there are no kernels."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there are none, which is said once."""
    if os.environ.get(SWITCH) == "off":
        return None
    try:
        return ctypes.CDLL(str(built()))
    except (CannotBuildError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            warnings.warn(
                f"MLTFR runs without its CPU kernels, and slower: {error}. "
                f"Results are the same to rounding. {SWITCH}=off says that this is meant.",
                stacklevel=2,
            )
        return None


def built() -> Path:
    """The shared library, compiled unless it is there.

    Raises:
        CannotBuildError: No compiler, no AVX2, or the compiler failed.
        OSError: The cache folder cannot be written.
    """
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        raise CannotBuildError("this processor has no AVX2 (or torch was told not to use it)")
    here = Path(__file__).parent
    parts = [(here / name).read_bytes() for name in SOURCES]
    name = hashlib.sha256(b"\0".join([*parts, " ".join(FLAGS).encode()])).hexdigest()[:16]
    path = cache_folder() / f"kernels-{name}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        compile_into(path, [str(here / name) for name in SOURCES if name.endswith(".cpp")])
    return path


def cache_folder() -> Path:
    """Where compiled kernels are kept: a folder of the user's own."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mltfr_dist"


def compile_into(path: Path, sources: list[str]) -> None:
    """Compile beside ``path``, then move: processes that build at once do not meet.

    Raises:
        CannotBuildError: There is no compiler, or it failed.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise CannotBuildError("there is no C++ compiler (c++, g++; CXX names another)")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [*compiler.split(), *FLAGS, *sources, "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CannotBuildError(f"{compiler} did not run: {error}") from error
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["it says nothing"]
            raise CannotBuildError(f"{compiler} failed: {lines[0]}")
        made.replace(path)


def usable(*tensors: Tensor) -> ctypes.CDLL | None:
    """The kernels where they take these ``tensors``: in fp32 on the CPU, and not traced."""
    plain = all(
        type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and t.dtype == torch.float32
        for t in tensors
    )
    return library() if plain and not torch.compiler.is_compiling() else None


def pointer(t: Tensor | None) -> ctypes.c_void_p:
    """Where the numbers of a contiguous tensor stand; null for None."""
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def sizes(*numbers: int) -> list[ctypes.c_int64]:
    """Numbers as the kernels take them, and after them the number of threads."""
    return [ctypes.c_int64(n) for n in (*numbers, torch.get_num_threads())]
