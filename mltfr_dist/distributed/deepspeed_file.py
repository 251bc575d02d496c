"""A DeepSpeed file, read strictly: it owns sharding and offload, and the run's configuration owns
batch sizes, precision, clipping and the optimizer.

DeepSpeed ignores keys it does not know, so the file is checked here, before any work.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mltfr_dist.config import RunConfig
from mltfr_dist.data.stream.training import BatchLayout
from mltfr_dist.errors import ConfigError
from mltfr_dist.files import with_packaged
from mltfr_dist.optimizers import OPTIMIZERS
from mltfr_dist.schema import or_nearest

FILE_KEYS = ("zero_optimization", "zero_force_ds_cpu_optimizer", "aio")
"""What a DeepSpeed file may hold."""

RUN_KEYS = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and training.micro_batch_size",
    "gradient_clipping": "optimizer.max_grad_norm",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
}
"""What the run sets, and where."""

WHOLE_MOMENTS = 512 << 20
"""Bytes of moments of the item table up to which each rank holds them whole, unless told
otherwise.
"""


def read_deepspeed_file(path: Path) -> dict[str, Any]:
    """Read and check a DeepSpeed file: one that is there, or else one of that name in the package.

    Raises:
        ConfigError: Missing, not JSON, holds a key that the run sets, or one that DeepSpeed does
            not know.
    """
    try:
        content = json.loads(with_packaged(path).read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"The DeepSpeed file {path} does not exist.",
            remedy="Set `deepspeed` to one of ds_configs/*.json.",
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"The DeepSpeed file {path} is not JSON: {error}.",
            remedy="Correct it, or start from ds_configs/zero1.json.",
        ) from None
    for key in content:
        if key in RUN_KEYS:
            raise ConfigError(
                f"`{key}` is set in {path} (to {json.dumps(content[key])}).",
                rule="The DeepSpeed file holds sharding and offload only, so that no number has "
                "two sources.",
                remedy=f"Remove it there and set `{RUN_KEYS[key]}` in the run's configuration.",
            )
        if key not in FILE_KEYS:
            raise ConfigError(
                f"`{key}` in {path} is not a key of a sharding file"
                f"{or_nearest(key, list(FILE_KEYS))}.",
                rule="DeepSpeed would ignore it without a word.",
                remedy=f"Remove or correct it; valid keys: {', '.join(FILE_KEYS)}.",
            )
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    _check_keys(
        content.get("zero_optimization", {}), DeepSpeedZeroConfig, "zero_optimization", path
    )
    return content  # type: ignore[no-any-return]


def _check_keys(values: dict[str, Any], model: type[BaseModel], where: str, path: Path) -> None:
    fields = {(field.alias or name): field for name, field in model.model_fields.items()}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(
                f"`{where}.{key}` in {path} is not a DeepSpeed key{or_nearest(key, list(fields))}.",
                rule="DeepSpeed would ignore it without a word.",
                remedy="Remove or correct it.",
            )
        if value == "auto":
            raise ConfigError(
                f'`{where}.{key}` in {path} is "auto".',
                rule="Nothing fills it in here, and DeepSpeed would drop it.",
                remedy="Give a value.",
            )
        if isinstance(value, dict):
            section = next((a for a in _models(fields[key].annotation)), None)
            if section is not None:
                _check_keys(value, section, f"{where}.{key}", path)


def _models(annotation: Any) -> list[type[BaseModel]]:
    options = getattr(annotation, "__args__", (annotation,))
    return [a for a in options if isinstance(a, type) and issubclass(a, BaseModel)]


def sharding_file(config: RunConfig, world_size: int, num_items: int) -> Path:
    """The run's DeepSpeed file. Where it names none: stage 1, if it is needed or saves much.

    Stage 0 has every rank hold all moments; in return a step copies no gradient and gathers no
    parameter.
    """
    if config.deepspeed is not None:
        return config.deepspeed
    moments = 8 * num_items * config.backbone.hidden_dim  # Adam's two, in fp32
    small = moments <= WHOLE_MOMENTS and not config.published.trained_tables
    whole = not OPTIMIZERS[config.optimizer.name].elementwise or world_size == 1 or small
    stage = 0 if whole and config.training.precision == "fp32" else 1
    return Path(f"ds_configs/zero{stage}.json")


def zero_stage(sharding: dict[str, Any]) -> int:
    """ZeRO's stage in a DeepSpeed configuration."""
    stage: int = sharding.get("zero_optimization", {}).get("stage", 0)
    return stage


def deepspeed_config(config: RunConfig, layout: BatchLayout, num_items: int) -> dict[str, Any]:
    """The complete DeepSpeed configuration: the file's sharding with the run's numbers."""
    file = sharding_file(config, layout.world_size, num_items)
    content = read_deepspeed_file(file)
    stage = zero_stage(content)
    if config.training.precision == "bf16" and stage == 0:
        raise ConfigError(
            f"training.precision=bf16 with ZeRO stage 0 ({file}).",
            rule="DeepSpeed's stage 0 keeps no faithful fp32 master in bf16: losses drift from "
            "those of stages 1 to 3.",
            remedy="Use deepspeed=ds_configs/zero1.json.",
        )
    name = config.optimizer.name
    if stage > 0 and not OPTIMIZERS[name].elementwise:
        raise ConfigError(
            f"optimizer.name={name} with ZeRO stage {stage} ({file}).",
            rule=f"ZeRO hands an optimizer flat pieces of the parameters, and {name} looks at "
            f"their shapes.",
            remedy="Use deepspeed=ds_configs/zero0.json, or optimizer.name=adamw.",
        )
    return content | {
        "train_batch_size": layout.global_batch_size,
        "train_micro_batch_size_per_gpu": layout.micro_batch_size,
        "gradient_accumulation_steps": layout.grad_accum_steps,
        "gradient_clipping": config.optimizer.max_grad_norm or 0.0,
        "bf16": {"enabled": config.training.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 62,
    }
