"""`mltfr explain`: sample users of a run and the whole model, as a page and as TensorBoard
texts.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from mltfr_dist.data.batch import PADDING_IDX
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.errors import ConfigError
from mltfr_dist.files import write_atomically, writing
from mltfr_dist.serving.ablation import answer
from mltfr_dist.serving.explaining import explain
from mltfr_dist.training.reporting.board import FOLDER
from mltfr_dist.training.reporting.markdown import code, plain
from mltfr_dist.training.run_folder import load_result
from mltfr_dist.training.streams import ranking_stream
from mltfr_dist.training.using.explain_page import Explained, Group, page
from mltfr_dist.training.using.inference import LoadedRun, load_run

PAGE = "explain.html"
LEFT_OUT = 10
"""Latest items of a history that are left out in turn."""
SURVEYED = 512
"""Validation users over whom the whole model is described."""
GROUPS = ("head", "middle", "tail")
SHOWN_TOKENS = 12


def explain_run(
    folder: Path, output: Path | None = None, control: Path | None = None, users: int = 5
) -> Path:
    """Write the page, and texts into the run's TensorBoard; returns where the page is.

    Args:
        folder: Of a finished run.
        output: HTML file; None: `explain.html` in the run's folder.
        control: A finished run of other table content, whose figures stand beside.
        users: Sample users, the first of the validation split.

    Raises:
        ConfigError: A control of other data, no users, or a page that cannot be written.
        CheckpointError: No run, or an unfinished one.
    """
    if users < 1:
        raise ConfigError(f"--users is {users}.", remedy="Ask for at least one.")
    output = output or folder / PAGE
    if output.suffix != ".html":
        raise ConfigError(
            f"{output} does not end in .html.", remedy=f"Name a page, such as {PAGE}."
        )
    run = load_run(folder)
    metrics = _metrics(run, folder, control)
    histories = validation_histories(run, max(users, SURVEYED))
    answers = [
        answer(run, f"validation user {number}", row, LEFT_OUT)
        for number, row in enumerate(histories[:users], 1)
    ]
    explained = Explained(run, answers, _groups(run, histories), metrics)
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, page(explained))
    with writing(folder / FOLDER):
        write_texts(explained, folder)
    return output


def validation_histories(run: LoadedRun, count: int) -> list[list[str]]:
    """Raw ids of the first users' histories in the validation split: the last ``max_len``, and
    before them as many as are left out in turn.
    """
    histories: list[list[str]] = []
    alone = Ranks(0, 1, torch.device("cpu"))
    data = run.config.data.model_copy(update={"max_len": run.max_len + LEFT_OUT})
    config = run.config.model_copy(update={"data": data})
    for batch in ranking_stream(config, "valid", alone, once_a_user=True):
        for row in batch.item_ids.tolist():
            ids = [run.item_ids[number] for number in row if number != PADDING_IDX]
            histories += [ids] if ids else []
        if len(histories) >= count:
            break
    return list(islice(histories, count))


def _metrics(run: LoadedRun, folder: Path, control: Path | None) -> dict[str, dict[str, float]]:
    result = load_result(folder)
    assert result is not None
    metrics = {f"{run.config.name} (this run)": result.test}
    if control is not None:
        other = load_run(control)
        if other.inputs.hashes["data"] != run.inputs.hashes["data"]:
            raise ConfigError(
                f"The runs {folder} and {control} were trained on other data.",
                rule="A control differs in its tables' content, and in nothing else.",
                remedy="Train one on the same data, with `mltfr.table_content=random`.",
            )
        result = load_result(control)
        assert result is not None
        content = other.config.mltfr.table_content if other.config.mltfr.enabled else "no tables"
        metrics[f"{other.config.name} (control: {content})"] = result.test
    return metrics


def _groups(run: LoadedRun, histories: list[list[str]]) -> list[Group]:
    """Which tokens serve which items: users by the popularity of what is recommended first."""
    if run.model.mltfr is None:
        return []
    counts = run.items.counts
    assert counts is not None
    order = np.argsort(-counts[1:], kind="stable") + 1
    group_of = np.zeros(len(counts), dtype=int)
    for number, numbers in enumerate(np.array_split(order, len(GROUPS))):
        group_of[numbers] = number
    first = run.recommend(histories, k=1).numbers[:, 0]
    read: list[dict[tuple[str, str], float]] = [defaultdict(float) for _ in GROUPS]
    gates: list[dict[str, float]] = [defaultdict(float) for _ in GROUPS]
    users = np.bincount(group_of[first], minlength=len(GROUPS))
    for history, item in zip(histories, first.tolist(), strict=True):
        item_ids = torch.tensor([run.items.encode(history[-run.max_len :])], device=run.device)
        for view in explain(run.serving, run.tokens, item_ids)[0]:
            gates[group_of[item]][view.table] += view.gate_weight
            for token, weight in view.tokens:
                read[group_of[item]][view.table, token] += view.gate_weight * weight
    total: dict[tuple[str, str], float] = defaultdict(float)
    for shares in read:
        for key, weight in shares.items():
            total[key] += weight
    whole = sum(total.values()) or 1.0
    groups = []
    for name, count, shares, gate in zip(GROUPS, users.tolist(), read, gates, strict=True):
        own = sum(shares.values()) or 1.0
        lifted = sorted(shares, key=lambda key: total[key] / whole - shares[key] / own)
        tokens = [(*key, shares[key] / own, total[key] / whole) for key in lifted[:SHOWN_TOKENS]]
        means = {table: weight / max(1, count) for table, weight in gate.items()}
        groups.append(Group(name, count, means, tokens))
    return groups


def write_texts(explained: Explained, folder: Path) -> None:
    """The same in short as texts of TensorBoard, run `explain`, in place of earlier ones."""
    texts = folder / FOLDER / "explain"
    for earlier in texts.glob("events.*"):
        earlier.unlink()
    with SummaryWriter(str(texts)) as board:
        for number, one in enumerate(explained.answers):
            lines = [
                f"**Last items:** {plain('; '.join(one.history[-5:]))}",
                "",
                f"**Recommended:** {plain('; '.join(r.title or r.item_id for r in one.best))}",
                "",
                "| without | of the top ten stay | scores move by |",
                "|---|---|---|",
                *(
                    f"| {plain(effect.what)} | {effect.stay} | {effect.shift:.3f} |"
                    for effect in (*one.tables, *one.items)
                ),
            ]
            board.add_text(f"explain/user_{number}", "\n".join(lines), 0)
        for group in explained.groups:
            lines = ["| table | token | share here | share over all |", "|---|---|---|---|"]
            lines += [
                f"| {plain(table)} | {code(token)} | {here:.4f} | {over:.4f} |"
                for table, token, here, over in group.tokens
            ]
            board.add_text(f"explain/items_{group.name}", "\n".join(lines), 0)
