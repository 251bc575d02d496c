"""The registry of backbones: one line for each, from which the configuration, the models and the
help text follow.

A backbone with settings of its own has them in a file here, beside the registry.
"""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """Where a backbone is found and what it is."""

    path: str
    """``module:class`` under ``mltfr_dist.models``."""
    paper: str
    """What it is, with its source."""
    settings: str = ""
    """Section of `backbone` that holds its own settings; nothing where it has none."""
    reads_future: bool = False
    """Whether a position reads later ones, so that only the last of a sample may be scored."""


BACKBONES: dict[str, Entry] = {
    "sasrec": Entry("sasrec:SASRec", "Kang and McAuley 2018, causal transformer"),
    "esasrec": Entry(
        "esasrec:ESASRec", "Tikhonovich et al. 2025, LiGR layers (take loss.name=sampled_softmax)"
    ),
    "linrec": Entry("linrec:LinRec", "Liu et al. 2023, causal L2-normalised linear attention"),
    "fmlp": Entry("fmlp:FMLPRec", "Zhou et al. 2022, learned filters, made causal"),
    "bsarec": Entry(
        "bsarec:BSARec",
        "Shin et al. 2024, frequency filter beside attention, made causal",
        "bsarec",
    ),
    "bert4rec": Entry(
        "bert4rec:BERT4Rec", "Sun et al. 2019, bidirectional, masked items", "bert4rec"
    ),
    "cl4srec": Entry("cl4srec:CL4SRec", "Xie et al. 2022, SASRec with contrasted views", "cl4srec"),
    "sasrec_original": Entry(
        "sasrec_original:OriginalSASRec", "Kang and McAuley 2018, as in its first code"
    ),
    "linrec_original": Entry(
        "linrec_original:OriginalLinRec",
        "Liu et al. 2023, as in its authors' code (needs data.samples=prefixes)",
        reads_future=True,
    ),
    "fmlp_original": Entry(
        "fmlp_original:OriginalFMLPRec",
        "Zhou et al. 2022, as in its authors' code (needs data.samples=prefixes)",
        reads_future=True,
    ),
    "bsarec_original": Entry(
        "bsarec_original:OriginalBSARec",
        "Shin et al. 2024, as in its authors' code (needs data.samples=prefixes)",
        "bsarec",
        reads_future=True,
    ),
}
