"""DeepSpeed: one engine for one stage of training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mltfr_dist.config import RunConfig
from mltfr_dist.data.stream.training import BatchLayout, StepBatches
from mltfr_dist.distributed.clipping import JointNorm, NormOnDevice, may_be_asked, total_norm
from mltfr_dist.distributed.compiler import leave_compiler_out
from mltfr_dist.distributed.deepspeed_file import deepspeed_config, zero_stage
from mltfr_dist.distributed.divided_optimizer import row_optimizer
from mltfr_dist.distributed.health import NORM, Health, Verdict
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.resources import Stopwatch
from mltfr_dist.distributed.step_sums import StepSums
from mltfr_dist.errors import ConfigError
from mltfr_dist.files import code_sha256
from mltfr_dist.models.item_rows import ItemRows
from mltfr_dist.models.output import TrainingOutput
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.models.replay import SWITCH, Replay, is_asked_for, why_launched
from mltfr_dist.numerics import is_fast_in_float64
from mltfr_dist.optim import build_optimizer, learning_rate
from mltfr_dist.optimizers import OPTIMIZERS


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


def gather_alike(ranks: Ranks) -> None:
    """Compare what decides how often a rank gathers the parameters that ZeRO 3 holds in pieces.

    Raises:
        ConfigError: It differs.
    """
    fast = is_fast_in_float64(ranks.device)
    ranks.agree(
        {"whether the GPU works in float64 at half its rate in fp32": str(fast)},
        rule="Under ZeRO 3 ranks gather parameters together, and a GPU that does searches tables "
        "in one pass where others take two.",
        remedy="Start it on GPUs of one kind, or with a stage below 3.",
    )


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

        leave_compiler_out()
        self.config, self.ranks, self.layout, self.total_steps = config, ranks, layout, total_steps
        ds_config = deepspeed_config(config, layout, model.num_items)
        tables = [
            (f"{name}.weight", m) for name, m in model.named_modules() if isinstance(m, ItemRows)
        ]
        if config.training.precision == "bf16":
            if model.mltfr is not None:
                model.mltfr.cast_frozen(torch.bfloat16)
            for _, rows in tables:
                rows.dtype = torch.bfloat16
        self.zero_stage = zero_stage(ds_config)
        if self.zero_stage == 3:
            gather_alike(ranks)
        offloads = "offload_optimizer" in ds_config.get("zero_optimization", {})
        if offloads:
            ds_config.setdefault("zero_force_ds_cpu_optimizer", False)
        optimizer = build_optimizer(model, config.optimizer, fused=not offloads)
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=ds_config
        )
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self.replay = model.replay = self._recorder(model) if is_asked_for() else None
        if self.zero_stage == 0:
            self.deepspeed.zero_grad = self._clear_gradients
            if ranks.world_size == 1:
                self.deepspeed.allreduce_gradients = self._fill_gradients
            elif ranks.shared is not None:
                self.deepspeed.allreduce_gradients = self._share_gradients
        fuses = bool(optimizer.defaults.get("fused"))
        self.row_adam = (
            row_optimizer(*tables[0], config.optimizer, ranks, fused=fuses) if tables else None
        )
        self.joint_norm = (
            JointNorm(self.deepspeed, self.zero_stage, config.optimizer.max_grad_norm)
            if tables
            else None
        )
        self.health = Health(
            self.module,
            optimizer,
            ranks,
            [name for name, _ in tables],
            skips_on_device=fuses and OPTIMIZERS[config.optimizer.name].skips_on_device,
            keeps_gradients=self.zero_stage == 0 and self.deepspeed.optimizer is optimizer,
        )
        self.norm_on_device = self._norm_on_device() if self.health.skips_on_device else None
        self.stopwatch = Stopwatch(ranks.device)
        self._norm: Tensor | None = None

    def _recorder(self, model: Recommender) -> Replay | None:
        """What records training passes; None, and why is said, where they are not."""
        why = why_launched(model, self.ranks.device)
        if self.zero_stage == 3:
            why = "ZeRO 3 holds parameters in pieces"
        if why is None:
            return Replay(model)
        self.ranks.say(
            f"{SWITCH}=on: passes are launched kernel by kernel all the same, for {why}."
        )
        return None

    def _norm_on_device(self) -> NormOnDevice | None:
        """What spares stages 1 and 2 their waits for a GPU. None at other stages, on a CPU, and
        where rows that DeepSpeed does not hold have a part in the norm: the host counts these.
        """
        if self.zero_stage not in (1, 2) or self.joint_norm or may_be_asked(self.ranks.device):
            return None
        max_norm = self.config.optimizer.max_grad_norm
        return NormOnDevice(self.deepspeed.optimizer, max_norm, self.ranks, self.health.note_norm)

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

    def update(self, batches: StepBatches, step: int, *, forms_norm: bool = True) -> TrainingOutput:
        """One optimizer step from this rank's micro-batches; ``verdict`` then says whether it was
        skipped, and why.

        Each term is the mean over the *global* batch, whatever the division over ranks and
        micro-batches.

        Args:
            batches: This rank's share of the global batch, with the global batch's counts.
            step: Steps taken before this one in the stage: sets the learning rate.
            forms_norm: Whether :meth:`grad_norm` is asked for afterwards.

        Returns:
            Sums over the micro-batches of all ranks, on the CPU.
        """
        # DeepSpeed averages over ranks and micro-batches; we want sums over the one global
        # denominator.
        shares = self.layout.world_size * self.layout.grad_accum_steps
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optimizer, step, self.total_steps)
        outputs: list[TrainingOutput] = []
        for batch in batches.micro_batches:
            self.stopwatch.mark("forward")
            given = batch if self.replay is None else batch.in_room(self.replay.max_len)
            output: TrainingOutput = self.deepspeed(given.to(self.ranks.device))
            counts = batches.counts()
            means = [t.weight * (t.sum * (shares / counts[t.over])) for t in output.terms.values()]
            loss = sum(means[1:], means[0])
            self.stopwatch.mark("backward")
            self.deepspeed.backward(loss)
            self.health.note_loss(loss)
            terms = {k: t._replace(sum=t.sum.detach()) for k, t in output.terms.items()}
            outputs.append(output._replace(terms=terms))
            if self.row_adam is not None:
                self.row_adam.collect()
            if self.deepspeed.is_gradient_accumulation_boundary():
                self._reduce_rows()
                sums = StepSums(outputs)
                told = self.health.agree(sums.vector)
                of_all = self.zero_stage == 0 and forms_norm
                self._norm = total_norm(self.module) if of_all else None
            self.stopwatch.mark("optimizer")
            self.deepspeed.step()
        result = sums.output(self.health.read(told))
        if not self.verdict.nonfinite and not self.deepspeed.was_step_applied():
            # Finite gradients, their norm not: DeepSpeed skips them at stages 1 to 3 unsaid.
            self.health.verdict = self.verdict._replace(nonfinite=(NORM,))
        self._step_rows()
        self.stopwatch.mark("")
        return result

    def _fill_gradients(self, *_: object, **__: object) -> None:
        """What stage 0 does at one rank, but for two copies of all gradients to divide them by 1:
        what no loss reached has a gradient of zero.
        """
        for p in self._trained:
            if p.grad is None:
                p.grad = torch.zeros_like(p)

    def _share_gradients(self, *_: object, **__: object) -> None:
        """What DeepSpeed does at stage 0, through memory: the mean over the ranks."""
        if self.ranks.shared is None or not self.deepspeed.is_gradient_accumulation_boundary():
            return
        grads = []
        for p in self._trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.contiguous()
            grads.append(p.grad)
        self.ranks.shared.reduce(grads, scale=1 / self.ranks.world_size)

    def _clear_gradients(self) -> None:
        """What DeepSpeed does at stage 0, which goes through all modules to find the parameters."""
        for p in self._trained:
            p.grad = None

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
        """Global gradient norm of the last update before clipping; None where it was not formed:
        at stage 0 by us if it is asked for, at stages 1 to 3 by DeepSpeed.
        """
        if self.norm_on_device is not None:
            return float(self.norm_on_device.norm)
        norm = self._norm if self.zero_stage == 0 else self.deepspeed.get_global_grad_norm()
        if norm is None or self.joint_norm is None:
            return None if norm is None else float(norm)
        return math.hypot(float(norm), math.sqrt(float(self.joint_norm.rest)))

    def destroy(self) -> None:
        """Free what DeepSpeed holds, so that another engine can follow in the same process."""
        self.replay = self.module.replay = None
        self.deepspeed.destroy()


def versions() -> dict[str, str]:
    """What must be the same on every rank: this package's code and the libraries that compute."""
    import deepspeed

    return {
        "the code of mltfr_dist": code_sha256(),
        "torch's version": torch.__version__,
        "deepspeed's version": deepspeed.__version__,
    }
