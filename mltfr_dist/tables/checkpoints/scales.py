"""Scales of FP8 embeddings: a true row is the stored one times its scale.

Every convention met multiplies, `weight_scale_inv` of DeepSeek and `transformers` included (its
name is that of the inverse of the scale used to quantise).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mltfr_dist.errors import DataError
from mltfr_dist.tables.checkpoints.stored import StoredTensor, bytes_of

SCALE_NAMES = ("weight_scale_inv", "weight_scale", "scale_weight", "scale_inv", "scale", "scales")
"""What is added to the module's name; of activations (`input_scale`) none concerns the weight."""

_ACTIVATIONS = ("input_scale", "output_scale", "activation_scale", "input_scale_ub")
_SCALE_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E8M0")
_REMEDY = "Use an unquantised checkpoint or a GGUF file."


@dataclass(frozen=True)
class Scale:
    """Scales of a tensor [V_m, D_m], one for each block of rows and columns.

    Attributes:
        stored: the scales, [V_m / rows, D_m / columns], rounded up.
        block: (rows, columns) that share a scale.
    """

    stored: StoredTensor
    block: tuple[int, int]

    def __str__(self) -> str:
        """For the log."""
        shape = ", ".join(str(size) for size in self.stored.shape)
        last = self.stored.name.rpartition(".")[2]
        return f"{last} {self.stored.dtype} [{shape}], one for {self.block[0]} x {self.block[1]}"

    def of_rows(self, start: int, stop: int, dim: int) -> tuple[bytes, torch.Tensor]:
        """The stored bytes and the factors of some rows, [stop - start, D_m] in float32."""
        high, wide = self.block
        stored = self.stored
        scale = (
            stored.rows(start // high, (stop - 1) // high + 1) if stored.shape else stored.whole()
        )
        factors = scale.to(torch.float32).reshape(scale.shape[0] if scale.dim() else 1, -1)
        rows = torch.arange(start, stop) // high - start // high
        return bytes_of(scale.contiguous()), factors.repeat_interleave(wide, 1)[rows, :dim]


def scale_names(name: str, beside: Collection[str]) -> list[str]:
    """Which of the tensors beside an embedding (``choose.siblings``) are its scales.

    Raises:
        DataError: there are tensors whose meaning is not known, or scales of two kinds.
    """
    module = name.rpartition(".")[0]
    known = {f"{module}.{last}" for last in SCALE_NAMES if module}
    known |= {f"{name}_scale", f"{name}_scale_inv", f"{name}.scale"}
    ignored = {f"{module}.{last}" for last in _ACTIVATIONS}
    others = [one for one in beside if one not in known | ignored]
    scales = [one for one in beside if one in known]
    if others or len(scales) > 1:
        raise DataError(
            f"Beside {name} the checkpoint holds {', '.join([*others, *scales][:6])}, which change "
            "what its values mean.",
            rule="One set of scales (such as weight_scale_inv) of an FP8 embedding is applied; "
            "zero points, second scales and packed integers are not.",
            remedy=_REMEDY,
        )
    return scales


def find_scale(
    table: StoredTensor,
    scale: StoredTensor | None,
    settings: Mapping[str, Any],
    others: Collection[str],
) -> Scale | None:
    """How the scales of ``table`` lie over its rows and columns; None: it has none.

    Args:
        table: the embedding, [V_m, D_m].
        scale: the tensor of its scales, if there is one.
        settings: ``config.json``.
        others: names of all tensors of the checkpoint.

    Raises:
        DataError: the scales are missing, or what they belong to is in doubt.
    """
    is_fp8 = table.dtype.startswith("F8_")
    if scale is None:
        if is_fp8 and (sign := _sign_of_scales(table.name, settings, others)):
            raise DataError(
                f"{table.name} is stored as {table.dtype} and its scales are missing: {sign}.",
                rule="Rows without their scales are other rows.",
                remedy="Fetch the checkpoint again, all files of it; or use an unquantised one.",
            )
        return None
    if not is_fp8 or scale.dtype not in _SCALE_DTYPES:
        raise DataError(
            f"{table.name} is stored as {table.dtype} with scales {scale.name} in {scale.dtype}.",
            rule=f"Scales in {', '.join(_SCALE_DTYPES)} of an embedding in FP8 can be applied.",
            remedy=_REMEDY,
        )
    num_rows, dim = table.shape
    count = torch.Size(scale.shape).numel()
    shape = scale.shape if len(scale.shape) == 2 else (count, 1)
    if count == 1:
        return Scale(scale, (num_rows, dim))
    if len(scale.shape) <= 2 and shape == (num_rows, 1):
        return Scale(scale, (1, dim))
    if len(scale.shape) == 2:
        stated = _stated_blocks(settings)
        divided = [(_power(num_rows, shape[0]), _power(dim, shape[1]))]
        for high, wide in stated or divided:
            if high and wide and (-(-num_rows // high), -(-dim // wide)) == shape:
                return Scale(scale, (high, wide))
    raise DataError(
        f"How the scales {scale.name} {list(scale.shape)} lie over {table.name} "
        f"{list(table.shape)} is in doubt.",
        rule="There is one for the tensor, one for each row, or one for each block whose shape "
        "config.json states (weight_block_size) or that divides the tensor by powers of two.",
        remedy="Fetch the checkpoint's config.json, or use an unquantised checkpoint.",
    )


def _power(size: int, num_blocks: int) -> int:
    """Numbers that share a scale if ``num_blocks`` divides ``size`` without doubt; else 0."""
    length, rest = divmod(size, num_blocks)
    return length if not rest and (length & (length - 1) == 0 or num_blocks == 1) else 0


def _quantisation(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    text = settings.get("text_config")
    for settings_section in (settings, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(section := settings_section.get(key), dict):
                yield section


def _stated_blocks(settings: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Block shapes that ``config.json`` states."""
    stated = []
    for section in _quantisation(settings):
        groups = section.get("config_groups")
        weights = [
            group.get("weights")
            for group in (groups.values() if isinstance(groups, dict) else ())
            if isinstance(group, dict)
        ]
        stated += [section.get("weight_block_size")]
        for one in weights:
            if isinstance(one, dict):
                stated += [one.get("block_structure"), [1, one.get("group_size")]]
    return [
        (block[0], block[1])
        for block in stated
        if isinstance(block, list) and len(block) == 2
        and all(type(size) is int and size > 0 for size in block)
    ]  # fmt: skip


def _sign_of_scales(name: str, settings: Mapping[str, Any], others: Collection[str]) -> str:
    """Why an FP8 tensor without scales is doubtful, or ""."""
    module = name.rpartition(".")[0]
    for section in _quantisation(settings):
        spared = [
            str(one)
            for key in ("modules_to_not_convert", "ignore", "ignored_layers")
            if isinstance(section.get(key), list)
            for one in section[key]
        ]
        if not any(module == one or module.endswith("." + one) for one in spared):
            return (
                f"config.json says that it is quantised ({section.get('quant_method', 'unnamed')})"
            )
    scaled = [one for one in others if one.endswith((".weight_scale", ".weight_scale_inv"))]
    return f"other tensors of the checkpoint have them ({min(scaled)})" if scaled else ""
