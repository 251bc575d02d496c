"""What the published form cannot do, though each of its fields is valid."""

from __future__ import annotations

from collections.abc import Mapping

from mltfr_dist.config import PublishedConfig
from mltfr_dist.errors import ConfigError


def check_group(published: PublishedConfig, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Whether experts that read their tables' own rows can be merged.

    Args:
        published: The defects.
        shapes: Of each table of the group: its width, and how many of its rows are kept.

    Raises:
        ConfigError: They differ.
    """
    if published.unaligned_experts and len(set(shapes.values())) > 1:
        listed = ", ".join(
            f"{name} {width} wide, {kept} kept" for name, (width, kept) in shapes.items()
        )
        raise ConfigError(
            "The consensus group cannot be merged with published.unaligned_experts=true: "
            f"{listed}.",
            rule="Such experts read a table's own rows, so a group's tables must be equally wide "
            "and keep equally many.",
            remedy="Give tables of one width in mltfr.consensus.group, or leave "
            "published.unaligned_experts out: then any can be merged.",
        )


def check_division(
    published: PublishedConfig, world_size: int, grad_accum_steps: int, zero_stage: int
) -> None:
    """Refuse what has no meaning once a batch is divided, or a model sharded.

    Raises:
        ConfigError: A memory of the whole batch over several ranks or micro-batches, or trained
            tables under ZeRO-3.
    """
    if published.pooled_memory and world_size * grad_accum_steps > 1:
        raise ConfigError(
            f"published.pooled_memory=true on {world_size} rank(s) with {grad_accum_steps} "
            "micro-batch(es) a step.",
            rule="What the whole batch keeps is not known where it is divided.",
            remedy="Use one rank and training.micro_batch_size=null, or leave "
            "published.pooled_memory out.",
        )
    if published.trained_tables and zero_stage == 3:
        raise ConfigError(
            "published.trained_tables=true under ZeRO stage 3.",
            rule="Trained tables are also read outside the forward pass, where stage 3 has them in "
            "parts.",
            remedy="Use deepspeed=ds_configs/zero1.json, or leave tables as they are.",
        )
