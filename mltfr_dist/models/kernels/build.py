"""Builds the kernels at their first use and keeps them; a machine that cannot takes the plain path.

Only a C++ compiler is needed: the kernels read memory alone and include nothing of torch, so that
they compile in half a minute at most and fit every release of it.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

SOURCES = (
    *("attended.h", "candidates.h", "common.h", "exponential.h", "panels.h", "registers.h"),
    *("rounded.h", "settled.h"),
    *("attention.cpp", "blocks.cpp", "counting.cpp", "finite.cpp", "histories.cpp"),
    *("leading.cpp", "masks.cpp", "mixing.cpp", "noise.cpp", "projection.cpp", "search.cpp"),
    *("softmax.cpp", "together.cpp", "weighing.cpp"),
)
FLAGS = (
    *("-O3", "-std=c++17", "-mavx2", "-mfma", "-fno-math-errno", "-fno-trapping-math"),
    *("-fPIC", "-pthread"),
)
VNNI_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
"""Added where the processor has AVX512-VNNI, which sums products of 8-bit numbers at once."""
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
        if _speaks():
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
    flags = flags_here()
    here = Path(__file__).parent
    contents = [(here / name).read_bytes() for name in SOURCES]
    name = hashlib.sha256(b"\0".join([*contents, " ".join(flags).encode()])).hexdigest()[:16]
    path = cache_folder() / f"kernels-{name}.so"
    if not path.exists():
        compiler = find_compiler()
        path.parent.mkdir(parents=True, exist_ok=True)
        if _speaks():
            print(
                f"CPU kernels are compiled, once, into {path.parent}: half a minute at most",
                file=sys.stderr,
                flush=True,
            )
        with _alone(path.with_suffix(".lock")):
            if not path.exists():
                sources = [here / name for name in SOURCES if name.endswith(".cpp")]
                compile_into(path, sources, [*compiler, *flags])
    return path


def flags_here() -> tuple[str, ...]:
    """What kernels are compiled with for this processor, as far as torch uses it.

    Raises:
        CannotBuildError: It has no AVX2.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in ("AVX2", "AVX512"):
        raise CannotBuildError("this processor has no AVX2 (or torch was told not to use it)")
    about = Path("/proc/cpuinfo")
    has_vnni = about.exists() and "avx512_vnni" in about.read_text().split()
    return (*FLAGS, *VNNI_FLAGS) if capability == "AVX512" and has_vnni else FLAGS


def cache_folder() -> Path:
    """Where compiled kernels are kept: a folder of the user's own."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mltfr_dist"


def find_compiler() -> list[str]:
    """The command that compiles C++.

    Raises:
        CannotBuildError: There is none.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise CannotBuildError("there is no C++ compiler (c++, g++; CXX names another)")
    return compiler.split()


def compile_into(path: Path, sources: Sequence[Path], compiler: Sequence[str]) -> None:
    """Compile beside ``path`` with the ``compiler`` and its flags, all sources at once, then move.

    Raises:
        CannotBuildError: The compiler failed.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, ThreadPoolExecutor() as pool:
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        commands = [
            [*compiler, "-c", str(source), "-o", made]
            for source, made in zip(sources, objects, strict=True)
        ]
        list(pool.map(_run, commands))
        made = Path(folder) / path.name
        _run([*compiler, "-shared", *objects, "-o", str(made)])
        made.replace(path)


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it says nothing"]
        raise CannotBuildError(f"{command[0]} failed: {lines[0]}")


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process of a machine at a time: the others wait, and find what it has made.

    The system gives the lock back where its process ends; where it gives none, all compile.
    """
    with lock.open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _speaks() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def usable(*tensors: Tensor) -> ctypes.CDLL | None:
    """The kernels where they take these ``tensors``: in fp32 on the CPU, and not traced."""
    if torch.compiler.is_compiling():
        return None
    for t in tensors:  # many times a step
        if type(t) not in (Tensor, nn.Parameter) or not t.is_cpu or t.dtype != torch.float32:
            return None
    return library()


def pointer(t: Tensor | None) -> ctypes.c_void_p:
    """Where the numbers of a contiguous tensor stand; null for None."""
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    """:func:`pointer` of each."""
    return (ctypes.c_void_p * len(tensors))(*(pointer(t).value for t in tensors))


def sizes(*numbers: int) -> list[ctypes.c_int64]:
    """Numbers as the kernels take them, and after them the number of threads."""
    return [ctypes.c_int64(n) for n in (*numbers, torch.get_num_threads())]
