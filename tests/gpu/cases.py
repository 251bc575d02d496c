"""What is trained on the CPU and on the GPU: every backbone, and each part that has a path of its
own.
"""

from __future__ import annotations

from typing import Any

from support import REPOSITORY

from mltfr_dist.backbones import BACKBONES

SAMPLED = {"loss__name": "sampled_softmax", "loss__num_negatives": 8}


def zero(name: str) -> dict[str, Any]:
    return {"deepspeed": str(REPOSITORY / "ds_configs" / f"{name}.json")}


def backbone(name: str) -> dict[str, Any]:
    samples = "prefixes" if BACKBONES[name].reads_future else "histories"
    return {"backbone__name": name, "data__samples": samples}


CASES: dict[str, dict[str, Any]] = {
    **{name: backbone(name) for name in BACKBONES},
    **{f"bare {name}": backbone(name) | {"mltfr__enabled": False} for name in BACKBONES},
    "exact search": {"mltfr__filter__shortlist_size": None},
    "filter ratio": {"mltfr__filter__top_k": None, "mltfr__filter__filter_ratio": 0.2},
    "random tokens": {"mltfr__filter__strategy": "random_tokens"},
    "prototypes": {"mltfr__filter__strategy": "learned_prototypes"},
    "seed words": {
        "mltfr__filter__strategy": "seed_words",
        "mltfr__filter__seed_words": ["first-3", "second-3"],
    },
    "other experts": {
        "mltfr__expert__per_table": 2,
        "mltfr__router__top_k": 2,
        "mltfr__router__null_expert": True,
        "mltfr__consensus__learn_weight": True,
        "mltfr__item_tokens__source": "titles",
    },
    "noise": {"mltfr__filter__noise": 0.5},
    "random tables": {"mltfr__table_content": "random"},
    "tables by rows": {"mltfr__placement": "rows"},
    "mapped tables": {"mltfr__placement": "mmap"},
    "sampled softmax": SAMPLED,
    "sparse items": SAMPLED | {"optimizer__item_gradients": "sparse"},
    "bce": {"loss__name": "bce", "loss__num_negatives": 4},
    "gbce": {"loss__name": "gbce", "loss__num_negatives": 4},
    "clipped, cosine": {"optimizer__max_grad_norm": 0.1, "optimizer__schedule": "cosine"},
    "accumulated": {"training__micro_batch_size": 16},
    "loader workers": {"data__num_workers": 2},
    "ZeRO 0": zero("zero0"),
    "ZeRO 2": zero("zero2"),
    "ZeRO 3": zero("zero3"),
    "ZeRO 3 and tables in it": zero("zero3") | {"mltfr__placement": "zero3"},
    "offloaded": zero("zero2_offload"),
    "recorded": {"mltfr__consensus__learn_weight": True},
    "recorded bare": {"mltfr__enabled": False},
    "recorded bert4rec": backbone("bert4rec"),
    "recorded accumulated": {"training__micro_batch_size": 16},
    "recorded ZeRO 0": zero("zero0"),
    "recorded ZeRO 2": zero("zero2"),
    "recorded sampled softmax": SAMPLED,
}
"""Name to changes of :func:`support.tiny_config`; `published` is added by the worker. Those
that begin with `recorded` have their passes recorded (models/replay.py).
"""

BF16 = (
    *("sasrec", "bare sasrec", "exact search", "sparse items", "ZeRO 2", "ZeRO 3"),
    *("recorded", "recorded bare"),
)
"""Cases that are trained in bf16 too."""
