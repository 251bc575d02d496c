"""Whether training gives the numbers of an older commit, to the digit, on this machine.

Each run is made twice by the same command, once with the code of ``--since`` and once with that of
this checkout, and their metrics.jsonl are compared line by line. All runs but `smoke` use small
random inputs. Options are given in today's words; a commit from before `published.*` gets them in
its own.

    python benchmarks/same_numbers.py --since main~20
    python benchmarks/same_numbers.py --since main~20 --data data/ml-100k --tables data/tables
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support import REPOSITORY, clean_environment, read_lines, torchrun, write_data, write_table

from mltfr_dist.backbones import BACKBONES

NEGATIVES = ("loss.name=sampled_softmax", "loss.num_negatives=8")
PUBLISHED = ("--preset", "paper", "mltfr.consensus.group=[first]", "loss.num_negatives=1")
MASKS = ("published.attending_padding=true", "published.read_before_mask=true")
WHOLE = ("loss.name=bce", "published.whole_sequence_filter=true")
OTHER_EXPERTS = (
    "mltfr.expert.per_table=2",
    "mltfr.router.top_k=2",
    "mltfr.router.null_expert=true",
    "mltfr.filter.shortlist_size=null",
    "mltfr.consensus.learn_weight=true",
    "mltfr.item_tokens.source=titles",
)


@dataclass(frozen=True)
class Run:
    """What is trained by both."""

    name: str
    options: tuple[str, ...] = ()
    ranks: int = 1


FORMERLY = {
    **{
        f"backbone.name={name}_original": (f"backbone.name={name}", "backbone.filter_scope=padded")
        for name in ("fmlp", "bsarec", "linrec")
    },
    MASKS[0]: ("backbone.padding=attended",),
    MASKS[1]: ("backbone.read_at=before_mask",),
    WHOLE[1]: ("backbone.filter_scope=sequence",),
    "published.double_softmax=true": ("mltfr.router.double_softmax=true",),
    "published.whole_history_query=true": ("mltfr.filter.query=history",),
    "published.negatives_outside_inputs=false": ("loss.negatives=unseen",),
}
"""Options of today, and what said the same before there was `published.*`."""


def backbone(name: str) -> tuple[str, ...]:
    """Options of a run of that backbone."""
    samples = "prefixes" if BACKBONES[name].reads_future else "histories"
    return (f"backbone.name={name}", f"data.samples={samples}")


RUNS = (
    *(Run(name, backbone(name)) for name in BACKBONES),
    *(Run(f"bare {name}", (*backbone(name), "mltfr.enabled=false")) for name in BACKBONES),
    Run("published", PUBLISHED),
    Run(
        "published bert4rec",
        (
            *PUBLISHED,
            "backbone.name=bert4rec",
            "loss.name=cross_entropy",
            "published.negatives_outside_inputs=false",
            *MASKS,
        ),
    ),
    Run("published bert4rec, shortlist", ("backbone.name=bert4rec", *MASKS)),
    Run("published fmlp", ("backbone.name=fmlp", *WHOLE)),
    Run("published bsarec", ("backbone.name=bsarec", *WHOLE)),
    Run(
        "published gate and query",
        ("published.double_softmax=true", "published.whole_history_query=true"),
    ),
    Run("other experts", OTHER_EXPERTS),
    Run("sparse items", (*NEGATIVES, "optimizer.item_gradients=sparse")),
    Run("two ranks, tables by rows", ("mltfr.placement=rows",), ranks=2),
    Run("two ranks, ZeRO 3", ("deepspeed=ds_configs/zero3.json",), ranks=2),
)


def small(inputs: Path) -> list[str]:
    """Options of a run of seconds over the inputs in ``inputs``, which it makes where they are
    missing.
    """
    if not (inputs / "data").exists():
        write_data(inputs)
        write_table(inputs / "tables", "first", num_rows=90, dim=12, seed=1)
        write_table(inputs / "tables", "second", num_rows=70, dim=20, seed=2)
    return [
        f"data.path={inputs / 'data'}",
        f"mltfr.tables=[{inputs / 'tables/first'}, {inputs / 'tables/second'}]",
        "data.max_len=10",
        "backbone.hidden_dim=16",
        "backbone.num_heads=2",
        "mltfr.expert.num_heads=2",
        "mltfr.expert.head_dim=4",
        "training.global_batch_size=32",
        "training.epochs=3",
        "training.consensus_epochs=2",
    ]


def started_from(options: tuple[str, ...]) -> list[str]:
    """The preset of a run, unless it names one, and a filter for small tables."""
    if "paper" in options:
        return []
    preset = ["--preset", "smoke"]
    shortlist = "mltfr.filter.shortlist_size=40"
    others = [shortlist] if not any("shortlist_size" in o for o in options) else []
    return [*preset, "mltfr.filter.top_k=4", "mltfr.filter.shortlist_refresh_steps=4", *others]


def in_words_of(checkout: Path, options: list[str]) -> list[str]:
    """``options`` as the code in ``checkout`` knows them."""
    if (checkout / "mltfr_dist" / "config" / "published.py").exists():
        return options
    return [word for option in options for word in FORMERLY.get(option, (option,))]


def train(run: Run, checkout: Path, options: list[str], folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of ``run`` by the code in ``checkout``."""
    command = (
        torchrun(run.ranks, checkout / "train.py")
        if run.ranks > 1
        else [sys.executable, str(checkout / "train.py")]
    )
    more = ["training.log_every_steps=1", "training.threads=1", f"runs_dir={folder}", "name=it"]
    done = subprocess.run(
        [*command, *in_words_of(checkout, options), *more],
        cwd=checkout,
        env=clean_environment(PYTHONPATH=str(checkout)),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{run.name} by {checkout} failed:\n{done.stderr[-3000:]}")
    return read_lines(folder / "it" / "metrics.jsonl")


def difference(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    """What differs first; empty where nothing does. Lines may have gained what was not measured
    then.
    """
    for number, (old, new) in enumerate(zip(before, now), start=1):
        keys = [key for key in old if old[key] != new.get(key)]
        if keys:
            return f"line {number}, {keys[0]}: {old[keys[0]]} then, {new.get(keys[0])} now"
    return "" if len(before) == len(now) else f"{len(before)} lines then, {len(now)} now"


def main() -> None:
    """Train, compare, print; exit code 1 where anything differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--since", required=True, help="the older commit")
    parser.add_argument("--data", type=Path, help="the demo's data: preset smoke is trained too")
    parser.add_argument("--tables", type=Path, help="the demo's tables")
    parser.add_argument("--only", help="runs whose name holds this")
    options = parser.parse_args()
    differing = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder, older = Path(temporary), Path(temporary) / "older"
        git = ["git", "-C", str(REPOSITORY), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", older, options.since], check=True)
        try:
            made = [(run, [*run.options, *started_from(run.options)]) for run in RUNS]
            runs = [(run, [*own, *small(folder / "inputs")]) for run, own in made]
            if options.data and options.tables:
                tables = sorted(str(p.resolve()) for p in options.tables.iterdir() if p.is_dir())
                own = ["--preset", "smoke", f"data.path={options.data.resolve()}"]
                runs.append((Run("smoke"), [*own, f"mltfr.tables=[{', '.join(tables)}]"]))
            for run, arguments in runs:
                if options.only and options.only not in run.name:
                    continue
                started = time.monotonic()
                traces = [
                    train(run, checkout, arguments, folder / which / run.name.replace(" ", "-"))
                    for which, checkout in (("then", older), ("now", REPOSITORY))
                ]
                result = difference(*traces)
                differing += bool(result)
                took = time.monotonic() - started
                print(
                    f"{run.name:28} {len(traces[0]):4} lines  {result or 'equal'}  ({took:.0f} s)",
                    flush=True,
                )
        finally:
            subprocess.run([*git, "remove", "--force", older], check=True)
    print(json.dumps({"differing": differing}))
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
