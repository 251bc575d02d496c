"""mltfr_dist: distributed training of MLTFR, Multi-LLM Token Filtering and Routing (arXiv
2604.18200).

What stands in ``__all__`` is the library; see docs/library.md. Each name is imported at its first
use, so that `import mltfr_dist` takes no time.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mltfr_dist.config import RunConfig
    from mltfr_dist.library.inputs import build_table, prepare
    from mltfr_dist.library.runs import (
        export,
        fit,
        index,
        load,
        load_exported,
        load_run,
        preset,
        push_to_hub,
    )

__version__ = "0.1.0"

__all__ = [
    "RunConfig",
    "__version__",
    "build_table",
    "export",
    "fit",
    "index",
    "load",
    "load_exported",
    "load_run",
    "prepare",
    "preset",
    "push_to_hub",
]

_ROOMS = {
    "RunConfig": "config",
    **dict.fromkeys(("build_table", "prepare"), "library.inputs"),
    **dict.fromkeys(
        ("export", "fit", "index", "load", "load_exported", "load_run", "preset", "push_to_hub"),
        "library.runs",
    ),
}
"""Name to the file that has it."""


def __getattr__(name: str) -> object:
    """A name of the library, imported now."""
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(_import_module(f"{__name__}.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
