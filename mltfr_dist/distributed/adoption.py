"""DeepSpeed takes up the process group that is there."""

from __future__ import annotations

import logging
import warnings

import torch.distributed as dist


def adopt_process_group() -> None:
    """Let DeepSpeed adopt the process group."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed's own calls; nothing a user could change.
    warnings.filterwarnings(
        "ignore", message=r"`torch\.distributed\..*` is deprecated", category=FutureWarning
    )
    # A compiled shared-memory all-reduce for one CPU node: a minute of compilation, and a killed
    # rank leaks its buffers.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
