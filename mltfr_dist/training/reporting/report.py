"""`report.md`, the run's model card (with card.py), and what the screen shows at the end."""

from __future__ import annotations

import math
import platform

import torch

from mltfr_dist import __version__
from mltfr_dist.config import RunConfig
from mltfr_dist.data.shards.manifest import Manifest
from mltfr_dist.data.shards.short_parts import recorded_counts
from mltfr_dist.distributed.deepspeed_file import sharding_file
from mltfr_dist.distributed.devices import uses_gpus
from mltfr_dist.distributed.item_placement import items_text
from mltfr_dist.distributed.placement import placement_text
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.files import with_packaged, write_atomically
from mltfr_dist.repairs import REPAIRS, taken_away
from mltfr_dist.training.evaluating.routing import TOP_SHARE, WEIGHT
from mltfr_dist.training.inputs import Inputs
from mltfr_dist.training.run_folder import BACKBONE, RANKS, REPORT, RESULT, Result, dump_config

SHOWN = ("HR@10", "NDCG@10")
PICKED = {
    "valid": "test read once, checkpoints picked on validation",
    "test": "the checkpoint was picked on the test split, as published: its figures are too high",
}
GROUNDED = (
    "Items carry the tokens of their titles: a positive control, outside the claim that no "
    "item text is needed."
)
"""Said of every run with mltfr.item_tokens.source=titles."""

UNCOUNTED = (
    "This data was prepared before items.parquet counted training parts of one item: popularity "
    "and the thirds of items lack those of users without a validation target. To count them, "
    "prepare it again into a new folder."
)
"""Said of old prepared folders."""


def hardware() -> str:
    """What the run was measured on."""
    if uses_gpus():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{platform.machine()} CPU"


def opening(config: RunConfig, inputs: Inputs, ranks: Ranks) -> str:
    """What is about to happen."""
    manifest = inputs.manifest
    sharding = sharding_file(config, ranks.world_size, manifest.num_items)
    lines = [
        f"mltfr_dist {__version__}: run `{config.name}` on {ranks.world_size} rank(s), "
        f"{hardware()}, "
        f"{torch.get_num_threads()} thread(s) each, {with_packaged(sharding)}, "
        f"{config.training.precision}",
        f"  data    {config.data.path}: {manifest.num_users:,} users, {manifest.num_items:,} "
        f"items, "
        f"{manifest.num_interactions:,} interactions",
    ]
    lines += [
        f"  table   {t.name}: {len(t.rows):,} "
        f"{'tokens' if t.content == 'real' else t.content + ' rows'} x {t.rows.shape[1]}"
        for t in inputs.tables
    ]
    if inputs.tables:
        lines.append(f"  tables  {placement_text(config, ranks)}")
    if config.item_table.placement != "replicated":
        lines.append(f"  items   {items_text(config, ranks)}")
    if missing := taken_away(config):
        lines.append(f"  repairs taken away: {', '.join(missing)}")
    lines += [f"  note    {GROUNDED}"] * is_grounded(config)
    lines += [f"  note    {UNCOUNTED}"] * counts_are_partial(config, manifest)
    lines.append(f"  folder  {config.folder}  (tensorboard --logdir {config.runs_dir})")
    return "\n".join(lines)


def counts_are_partial(config: RunConfig, manifest: Manifest) -> bool:
    """Whether popularity and the slices of users miss training interactions."""
    short = manifest.report.short_train_sequences
    return short > 0 and recorded_counts(config.data.path, manifest) is None


def is_grounded(config: RunConfig) -> bool:
    """Whether the run reads item text."""
    return config.mltfr.enabled and config.mltfr.item_tokens.source == "titles"


def rows(results: list[Result]) -> list[list[str]]:
    """The comparison: one row a model."""
    table = [["model", *(f"test {m}" for m in SHOWN), *(f"valid {m}" for m in SHOWN), "time"]]
    for r in results:
        metrics = [f"{values[m]:.4f}" for values in (r.test, r.valid) for m in SHOWN]
        table.append([r.name, *metrics, f"{r.seconds:.0f} s"])
    return table


def closing(config: RunConfig, results: list[Result]) -> str:
    """The comparison as aligned text, and what to do next."""
    table = rows(results)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [
        "",
        *(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths))
            )
            for row in table
        ),
    ]
    rule = (
        f"seen items {'left out' if config.evaluation.filter_seen else 'kept'}, ties "
        f"{config.evaluation.ties}"
    )
    lines += ["", f"Full ranking of every item, {rule}; {PICKED[config.picks_on]}."]
    lines += [GROUNDED] * is_grounded(config)
    lines.append(
        f"One seed ({config.training.seed}): differences of this size need several to mean "
        f"anything."
    )
    lines.append(
        f"Report: {config.folder / REPORT}   Use it: mltfr recommend {config.folder} --history "
        f"ID,ID,... --k 10"
    )
    return "\n".join(lines)


def repairs_line(config: RunConfig) -> list[str]:
    """What of the published procedure is brought back."""
    missing = taken_away(config)
    if not missing:
        return []
    names = ", ".join(f"{name} ({REPAIRS[name].defect})" for name in missing)
    return [f"- As published in place of repaired: {names}; docs/method.md says what each does."]


def routing_section(result: Result) -> list[str]:
    """Whether one expert dominates the gate."""
    if not result.routing:
        return []
    names = [name.removeprefix(WEIGHT) for name in result.routing if name.startswith(WEIGHT)]
    lines = ["", "## Routing", "", "| gate | mean weight | largest at |", "|---|---|---|"]
    lines += [
        f"| {n} | {result.routing[WEIGHT + n]:.3f} | {result.routing[TOP_SHARE + n]:.1%} of "
        f"positions |"
        for n in names
    ]
    limit = math.log(len(names))
    return [
        *lines,
        "",
        f"Over the validation histories. Entropy of the gate {result.routing['entropy']:.2f} of at "
        f"most {limit:.2f} nats "
        "(which equal weights have); a gate that is the largest everywhere dominates.",
    ]


def is_written(config: RunConfig) -> bool:
    """Whether report.md is there, of this very configuration and of no earlier results or ranks."""
    report = config.folder / REPORT
    folders = (config.folder, config.folder / BACKBONE)
    results = [folder / name for folder in folders for name in (RESULT, RANKS)]
    if not report.exists() or dump_config(config).rstrip() not in report.read_text():
        return False
    written = report.stat().st_mtime_ns
    return all(path.stat().st_mtime_ns <= written for path in results if path.exists())


def write(config: RunConfig, inputs: Inputs, results: list[Result]) -> None:
    """Write report.md, unless it is there."""
    if is_written(config):
        return
    from mltfr_dist.training.reporting import card  # statistics and plots: no start needs them

    manifest, final = inputs.manifest, results[-1]
    table = rows(results)
    text = [
        f"# {config.name}",
        "",
        "| " + " | ".join(table[0]) + " |",
        "|" + "---|" * len(table[0]),
    ]
    text += ["| " + " | ".join(row) + " |" for row in table[1:]]
    text += [
        "",
        "## Every metric",
        "",
        "| model | split | " + " | ".join(final.test) + " |",
        "|---|---|" + "---|" * len(final.test),
    ]
    for r in results:
        for split, values in (("valid", r.valid), ("test", r.test)):
            text.append(
                f"| {r.name} | {split} | " + " | ".join(f"{v:.6f}" for v in values.values()) + " |"
            )
    text += [
        *card.results_section(config, results),
        *card.curves_section(config),
        *routing_section(final),
        "",
        "## How",
        "",
        f"- {card.protocol_line(config, manifest)}",
        f"- Full ranking: every one of {manifest.num_items:,} items is a candidate"
        + (", except those of the user's own history" if config.evaluation.filter_seen else "")
        + f"; among equal scores the target's rank is {config.evaluation.ties}.",
        f"- Split `{manifest.prepare.split_in_words}`; {manifest.splits['test'].num_sequences:,} "
        f"test users with {manifest.splits['test'].num_targets:,} targets; "
        f"{PICKED[config.picks_on]} (by {config.evaluation.select_by}).",
        *repairs_line(config),
        f"- The chosen model: stage `{final.stage}`, epoch {final.epoch}, {final.parameters:,} "
        f"trained parameters.",
        *[f"- **{GROUNDED}**"] * is_grounded(config),
        f"- Seed {config.training.seed}. One seed is no evidence: repeat with several before you "
        f"compare.",
        f"- {final.world_size} rank(s), {hardware()}, {config.training.precision}, "
        f"{sharding_file(config, final.world_size, manifest.num_items)}.",
        "",
        "Time is training with validation; baselines without a loop show the time to fit.",
        *card.fingerprint_section(config, inputs),
        *card.machine_section(final),
        *card.limits_section(config, manifest),
        *card.configuration_section(config),
    ]
    write_atomically(config.folder / REPORT, "\n".join(text))
