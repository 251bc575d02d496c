"""What rank 0 has read, sent to every rank.

Only rank 0 opens a run's folder. On a network file system the other nodes may not see for a while
what it has just written, and where `runs_dir` lies on each node's own disk they never do.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.watchdog import heartbeat

PIECE_BYTES = 1 << 26
"""Bytes sent at a time, so that a large table needs no second copy on the device."""


def send_text(text: str | None, ranks: Ranks) -> str:
    """Rank 0's text on every rank, however long; the others' is not read. All ranks must call."""
    if ranks.world_size == 1:
        return text or ""
    own = (text or "").encode() if ranks.is_main else b""
    size = int(ranks.max(torch.tensor([len(own)])).item())
    content = torch.zeros(size, dtype=torch.uint8)
    if own:
        content = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    send_bytes(content, ranks)
    return content.numpy().tobytes().decode()


def send_tensors(tensors: dict[str, Tensor] | None, ranks: Ranks) -> dict[str, Tensor]:
    """Rank 0's tensors by name, on the CPU of every rank. All ranks must call.

    Args:
        tensors: On the CPU; read on rank 0 alone.
        ranks: All processes.
    """
    if ranks.world_size == 1:
        return tensors or {}
    own = tensors if tensors is not None and ranks.is_main else {}
    described = {name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in own.items()}
    kinds: dict[str, list[Any]] = json.loads(send_text(json.dumps(described), ranks))
    received = {}
    for name, (dtype, *shape) in kinds.items():
        whole = own[name] if name in own else torch.empty(shape, dtype=getattr(torch, dtype))
        received[name] = whole = whole.contiguous()
        send_bytes(whole.view(-1).view(torch.uint8), ranks)
    return received


def send_bytes(content: Tensor, ranks: Ranks) -> None:
    """Overwrite ``content``, bytes of equal number on every rank, with rank 0's. All
    ranks must call.
    """
    if ranks.world_size == 1:
        return
    for piece in torch.split(content, PIECE_BYTES) if len(content) else ():
        on_device = piece.to(ranks.device)
        dist.broadcast(on_device, src=0)
        if not ranks.is_main:
            piece.copy_(on_device)
        heartbeat()
