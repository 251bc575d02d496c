"""DeepSpeed: one engine for one stage of training, and a strict reading of its file.

The run's configuration owns batch sizes, precision, clipping and the optimizer; the DeepSpeed file
owns sharding and offload. DeepSpeed ignores keys it does not know, so the file is checked here,
before any work.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from mltfr_dist.config import RunConfig
from mltfr_dist.data.stream.training import BatchLayout, StepBatches
from mltfr_dist.distributed.clipping import JointNorm
from mltfr_dist.distributed.divided_optimizer import row_optimizer
from mltfr_dist.distributed.health import NORM, Health, Verdict
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.resources import Stopwatch
from mltfr_dist.errors import ConfigError
from mltfr_dist.files import code_sha256, with_packaged
from mltfr_dist.models.item_rows import ItemRows
from mltfr_dist.models.recommender import Recommender, TrainingOutput
from mltfr_dist.optim import build_optimizer, learning_rate
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


def deepspeed_config(config: RunConfig, layout: BatchLayout) -> dict[str, Any]:
    """The complete DeepSpeed configuration: the file's sharding with the run's numbers."""
    content = read_deepspeed_file(config.deepspeed)
    stage = content.get("zero_optimization", {}).get("stage", 0)
    if config.training.precision == "bf16" and stage == 0:
        raise ConfigError(
            f"training.precision=bf16 with ZeRO stage 0 ({config.deepspeed}).",
            rule="DeepSpeed's stage 0 keeps no faithful fp32 master in bf16: losses drift from "
            "those of stages 1 to 3.",
            remedy="Use deepspeed=ds_configs/zero1.json.",
        )
    name = config.optimizer.name
    if stage > 0 and not OPTIMIZERS[name].elementwise:
        raise ConfigError(
            f"optimizer.name={name} with ZeRO stage {stage} ({config.deepspeed}).",
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


def batch_layout(config: RunConfig, ranks: Ranks) -> BatchLayout:
    """How the global batch is divided.

    Raises:
        ConfigError: It cannot be divided evenly.
    """
    size = config.training.global_batch_size
    if size < ranks.world_size:
        raise ConfigError(
            f"training.global_batch_size {size} is below the number of ranks, {ranks.world_size}.",
            rule="Every rank needs at least one sequence of a batch.",
            remedy="Raise training.global_batch_size or start fewer ranks.",
        )
    micro = config.training.micro_batch_size or size // ranks.world_size
    return BatchLayout(ranks.rank, ranks.world_size, size, micro)


class Engine:
    """A model under DeepSpeed with its optimizer."""

    def __init__(
        self,
        model: Recommender,
        config: RunConfig,
        ranks: Ranks,
        layout: BatchLayout,
        total_steps: int,
    ) -> None:
        import deepspeed

        self.config, self.ranks, self.layout, self.total_steps = config, ranks, layout, total_steps
        ds_config = deepspeed_config(config, layout)
        tables = [
            (f"{name}.weight", m) for name, m in model.named_modules() if isinstance(m, ItemRows)
        ]
        if config.training.precision == "bf16":
            if model.mltfr is not None:
                model.mltfr.cast_frozen(torch.bfloat16)
            for _, rows in tables:
                rows.dtype = torch.bfloat16
        self.zero_stage: int = ds_config.get("zero_optimization", {}).get("stage", 0)
        offloads = "offload_optimizer" in ds_config.get("zero_optimization", {})
        if offloads:
            ds_config.setdefault("zero_force_ds_cpu_optimizer", False)
        optimizer = build_optimizer(model, config.optimizer, fused=not offloads)
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=ds_config
        )
        fuses = bool(optimizer.defaults.get("fused"))
        self.row_adam = (
            row_optimizer(*tables[0], config.optimizer, ranks, fused=fuses) if tables else None
        )
        self.joint_norm = (
            JointNorm(self.deepspeed, self.zero_stage, config.optimizer.max_grad_norm)
            if tables
            else None
        )
        self.health = Health(self.module, optimizer, ranks, [name for name, _ in tables])
        self.stopwatch = Stopwatch(ranks.device)

    @property
    def module(self) -> Recommender:
        """The model itself."""
        return self.deepspeed.module  # type: ignore[no-any-return]

    @property
    def optimizer_state(self) -> tuple[str, ...]:
        """Names of the tensors that the optimizer keeps for each parameter."""
        return OPTIMIZERS[self.config.optimizer.name].state

    @property
    def verdict(self) -> Verdict:
        """What the ranks agreed on in the last update."""
        return self.health.verdict

    def update(self, batches: StepBatches, step: int) -> list[TrainingOutput]:
        """One optimizer step from this rank's micro-batches; ``verdict`` then says whether it was
        skipped, and why.

        Each term is the mean over the *global* batch, whatever the division over ranks and
        micro-batches.

        Args:
            batches: This rank's share of the global batch, with the global batch's counts.
            step: Steps taken before this one in the stage: sets the learning rate.
        """
        # DeepSpeed averages over ranks and micro-batches; we want sums over the one global
        # denominator.
        shares = self.layout.world_size * self.layout.grad_accum_steps
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optimizer, step, self.total_steps)
        outputs = []
        for batch in batches.micro_batches:
            self.stopwatch.mark("forward")
            output: TrainingOutput = self.deepspeed(batch.to(self.ranks.device))
            counts = batches.counts()
            means = [t.weight * (t.sum * (shares / counts[t.over])) for t in output.terms.values()]
            loss = sum(means[1:], means[0])
            self.stopwatch.mark("backward")
            self.deepspeed.backward(loss)
            self.health.note_loss(loss)
            if self.row_adam is not None:
                self.row_adam.collect()
            if self.deepspeed.is_gradient_accumulation_boundary():
                self._reduce_rows()
                self.health.agree()
            self.stopwatch.mark("optimizer")
            self.deepspeed.step()
            terms = {k: t._replace(sum=t.sum.detach()) for k, t in output.terms.items()}
            outputs.append(output._replace(terms=terms))
        if not self.verdict.nonfinite and not self.deepspeed.was_step_applied():
            # Finite gradients, their norm not: DeepSpeed skips them at stages 1 to 3 unsaid.
            self.health.verdict = self.verdict._replace(nonfinite=(NORM,))
        self._step_rows()
        self.stopwatch.mark("")
        return outputs

    def _reduce_rows(self) -> None:
        if self.row_adam is not None and self.joint_norm is not None:
            self.row_adam.reduce()
            self.joint_norm.rest = self.row_adam.squared_norm()
            self.health.note_rows(self.joint_norm.rest)

    def _step_rows(self) -> None:
        if self.row_adam is not None and self.joint_norm is not None:
            if self.verdict.nonfinite:
                self.row_adam.forget()
            else:
                self.row_adam.step(
                    float(self.optimizer.param_groups[0]["lr"]), self.joint_norm.scale()
                )

    def grad_norm(self) -> float | None:
        """Global gradient norm of the last update before clipping, if DeepSpeed formed it."""
        norm = self.deepspeed.get_global_grad_norm()
        if norm is None or self.joint_norm is None:
            return None if norm is None else float(norm)
        return math.hypot(float(norm), math.sqrt(float(self.joint_norm.rest)))

    def destroy(self) -> None:
        """Free what DeepSpeed holds, so that another engine can follow in the same process."""
        self.deepspeed.destroy()


def versions() -> dict[str, str]:
    """What must be the same on every rank: this package's code and the libraries that compute."""
    import deepspeed

    return {
        "the code of mltfr_dist": code_sha256(),
        "torch's version": torch.__version__,
        "deepspeed's version": deepspeed.__version__,
    }
