"""Files of ranks as models with seeds, refused where they cannot be compared. Shapes: S seeds, T
targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from mltfr_dist.data.shards.packed import IntArray
from mltfr_dist.errors import DataError
from mltfr_dist.statistics.resampling import Floats
from mltfr_dist.training.comparing.load import Measured

ECHOED_USERS = 5
"""Users that an error names."""


@dataclass(frozen=True)
class Model:
    """Runs that differ in their seed alone."""

    label: str
    files: tuple[str, ...]
    seeds: tuple[int | None, ...]
    ranks: Floats
    """[S, T], targets in the order of the first file."""
    picked_on: str
    """Metric and split that picked the checkpoint; empty where there was none to pick."""


@dataclass(frozen=True)
class Models:
    """Models over the same targets, and by which rules they were ranked."""

    models: tuple[Model, ...]
    users: IntArray
    """[T] number of each target's user, from 0."""
    protocol: dict[str, str]
    """Empty where no file says."""
    unknown: tuple[str, ...]
    """Files that do not say by which rules they were ranked."""
    slicing: dict[str, Floats]

    @property
    def num_users(self) -> int:
        """Users, who are what is compared."""
        return int(self.users.max()) + 1


def as_models(measured: Sequence[Measured], labels: Sequence[str] | None = None) -> Models:
    """Join what is one model's.

    Args:
        measured: The files.
        labels: The model of each; None: as the files say.

    Raises:
        DataError: Files of other rules, users or targets, or a run that stands there twice.
    """
    check_protocols(measured)
    first = measured[0]
    groups: dict[Any, list[tuple[Measured, Floats]]] = {}
    for index, one in enumerate(measured):
        key = labels[index] if labels else one.about.get("model_sha256", one.path)
        groups.setdefault(key, []).append((one, aligned_ranks(one, first)))
    models = [_model(group, key if labels else "") for key, group in groups.items()]
    taken = [model.label for model in models]
    for index, model in enumerate(models):
        if taken.count(model.label) > 1:
            models[index] = Model(model.files[0], *list(vars(model).values())[1:])
    told = [one for one in measured if one.about]
    slicing: dict[str, Floats] = {}
    for one in reversed(measured):
        if one.users.equals(first.users) and one.targets.equals(first.targets):
            slicing |= one.slicing
    return Models(
        tuple(models),
        first.owners,
        told[0].about["protocol"] if told else {},
        tuple(str(one.path) for one in measured if not one.about),
        slicing,
    )


def _model(group: Sequence[tuple[Measured, Floats]], label: str) -> Model:
    seeds = [one.seed for one, _ in group]
    twice = [seed for seed in seeds if seeds.count(seed) > 1]
    if twice:
        files = [str(one.path) for one, _ in group if one.seed == twice[0]]
        raise DataError(
            f"{' and '.join(files)} are the same model with the same seed.",
            rule="A run counts once.",
            remedy="Leave out all but one of them.",
        )
    ordered = sorted(group, key=lambda pair: -1 if pair[0].seed is None else pair[0].seed)
    return Model(
        label or _label([one for one, _ in ordered]),
        tuple(str(one.path) for one, _ in ordered),
        tuple(one.seed for one, _ in ordered),
        np.stack([ranks for _, ranks in ordered]),
        _picked(ordered[0][0]),
    )


def _picked(run: Measured) -> str:
    """How a run's checkpoint was chosen."""
    if run.seed is None:
        return ""
    return f"{run.about.get('select_by', '?')} on {run.about.get('picked_on', '?')}"


def _label(runs: Sequence[Measured]) -> str:
    """The runs' common name: of beauty-bare-0 and beauty-bare-1 it is beauty-bare."""
    names = {one.name.removesuffix(f"-{one.seed}") for one in runs}
    return names.pop() if len(names) == 1 < len(runs) else runs[0].name


def check_protocols(measured: Sequence[Measured]) -> None:
    """Refuse files whose ranks came about by other rules; all that differs is named.

    Raises:
        DataError: Some did.
    """
    told = [one for one in measured if one.about]
    for one in told[1:]:
        first, other = told[0].about["protocol"], one.about["protocol"]
        differing = [
            f"{name} ({first.get(name, 'not said')} there, {other.get(name, 'not said')} here)"
            for name in {**first, **other}
            if first.get(name) != other.get(name)
        ]
        if differing:
            raise DataError(
                f"{one.path} cannot be compared with {told[0].path}; they differ in "
                f"{'; '.join(differing)}.",
                rule="Ranks are comparable where data, split, candidates, seen items and ties are "
                "the same.",
                remedy="Compare runs of one protocol, or evaluate one of them by the other's.",
            )


def aligned_ranks(one: Measured, first: Measured) -> Floats:
    """Ranks [T] in the order of another file's targets.

    Raises:
        DataError: The files hold different users, or different targets of a user.
    """
    own, others = one.users.unique(), first.users.unique()
    lacking = others.filter(pc.is_null(pc.index_in(others, value_set=own)))
    more = own.filter(pc.is_null(pc.index_in(own, value_set=others)))
    if len(lacking) or len(more):
        of_files = [
            f"{len(users):,} users {how} ({', '.join(users[:ECHOED_USERS].to_pylist())}"
            + ", ..." * (len(users) > ECHOED_USERS)
            + ")"
            for users, how in ((lacking, f"only in {first.path}"), (more, f"only in {one.path}"))
            if len(users)
        ]
        raise DataError(
            f"{one.path} and {first.path} hold different users: {' and '.join(of_files)}.",
            rule="A paired comparison needs each user's ranks by every model.",
            remedy="Evaluate both on the same users, by their raw ids.",
        )
    mine, theirs = (_pairs(file, first) for file in (one, first))
    differing = np.concatenate([np.setdiff1d(theirs, mine), np.setdiff1d(mine, theirs)])
    if len(differing):
        users = np.unique(differing // (len(first.targets) + 1))
        user = others[int(users[0])]
        told = [
            ", ".join(file.targets.filter(pc.equal(file.users, user))[:ECHOED_USERS].to_pylist())
            for file in (one, first)
        ]
        raise DataError(
            f"{one.path} ranks {told[0]} for user {user}, and {first.path} {told[1]}; "
            f"{len(users):,} users have different targets.",
            rule="A paired comparison needs the same targets of each user.",
            remedy="Evaluate both on the same split, by the raw ids of its items.",
        )
    ranks = np.empty_like(one.ranks)
    ranks[theirs.argsort()] = one.ranks[mine.argsort()]
    return ranks


def _pairs(file: Measured, first: Measured) -> IntArray:
    """[T] a number of each user and target, the same for two files that hold the same."""
    values = first.users.unique(), first.targets.unique()
    users, targets = (
        pc.fill_null(pc.index_in(ids, value_set=known), -1).to_numpy().astype(np.int64)
        for ids, known in zip((file.users, file.targets), values, strict=True)
    )
    pairs: IntArray = users * (len(first.targets) + 1) + targets + 1
    return pairs
