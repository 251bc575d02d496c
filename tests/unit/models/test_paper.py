"""The published form equals an independent statement of it (`published.py`), forward and gradient,
in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import published
import pytest
import torch
from support import new_mltfr, tiny_config, write_table
from torch import Tensor
from torch.nn import functional as F

from mltfr_dist.config import (
    ConsensusConfig,
    ExpertConfig,
    FilterConfig,
    MLTFRConfig,
    PublishedConfig,
    RouterConfig,
    RunConfig,
)
from mltfr_dist.data.batch import SequenceBatch
from mltfr_dist.data.stream.training import BatchLayout
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.models.consensus import merge
from mltfr_dist.models.draws import GumbelNoise, gumbel, history_keys
from mltfr_dist.models.experts import ExpertCore
from mltfr_dist.models.losses import binary_cross_entropy
from mltfr_dist.models.mltfr import MLTFR
from mltfr_dist.models.packing import Packing
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.models.routing import Routing
from mltfr_dist.models.selectors import Queries
from mltfr_dist.models.selectors.user_guided import UserGuided
from mltfr_dist.published.consensus import batch_mean_squares, merge_unnormalised
from mltfr_dist.published.experts import DoubleSoftmax
from mltfr_dist.published.selecting import straight_through
from mltfr_dist.repairs import as_published
from mltfr_dist.training.build import build_model
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.streams import train_stream
from mltfr_dist.tuning.space import with_values

DIM, LAMBDA, STEPS = 8, 0.3, 4
WIDTHS, ROWS = (6, 6, 5), (40, 30, 20)
GROUP = [0, 1]
HISTORIES = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8], [7]]
EXACT = {"rtol": 1e-10, "atol": 1e-10}
ONE = Ranks(0, 1, torch.device("cpu"))


def make(top_k: int, *, double_softmax: bool = False, consensus: bool = False) -> MLTFR:
    """MLTFR in published form with parameters far from their start."""
    torch.manual_seed(top_k)
    config = MLTFRConfig(
        tables=("a", "b", "c"),
        filter=FilterConfig(
            noise=1.0,
            top_k=top_k,
            temperature=0.5,
            learn_temperature=False,
            shortlist_size=None,
        ),
        expert=ExpertConfig(num_heads=4, head_dim=3),
        router=RouterConfig(balance_weight=0),
        consensus=ConsensusConfig(weight=LAMBDA),
    )
    made = new_mltfr(
        config,
        DIM,
        [torch.randn(rows, width) for rows, width in zip(ROWS, WIDTHS, strict=True)],
        PublishedConfig(
            whole_history_query=True,
            straight_through=True,
            pooled_memory=True,
            noise_in_evaluation=True,
            unaligned_experts=True,
            double_softmax=double_softmax,
        ),
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    if consensus:
        made.add_consensus(
            {name: torch.randn_like(p) for name, p in made.cores[0].named_parameters()}, GROUP
        )
    return made.double().eval()


def item_ids() -> Tensor:
    width = max(map(len, HISTORIES))
    return torch.tensor([h + [0] * (width - len(h)) for h in HISTORIES])


def embeddings() -> Tensor:
    x = torch.randn(
        *item_ids().shape, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    return (x * (item_ids() != 0)[..., None]).requires_grad_()


def added(mltfr: MLTFR, x: Tensor, ids: Tensor) -> Tensor:
    """[B, L, D], of embeddings [B, L, D]."""
    packing = Packing(ids)
    return packing.unpack(mltfr(packing.pack(x), packing)[0])


def noise_of(mltfr: MLTFR, m: int, ids: Tensor) -> Tensor:
    """[B, V_m] the noise that the filter draws."""
    token_filter = mltfr.selectors[m]
    assert isinstance(token_filter, UserGuided)
    drawn = token_filter.noise(history_keys(ids)[:, -1], torch.arange(mltfr.table(m).num_rows))
    assert drawn is not None
    return drawn.of(slice(None)).double()


def stated(mltfr: MLTFR, x: Tensor, ids: Tensor) -> Tensor:
    """What is added to block 0's output, by the independent statement."""
    valid, expert = ids != 0, mltfr.config.expert
    u = published.user_vectors(x, valid)
    attended, experts = [], []
    for m, core in enumerate(mltfr.cores):
        projection, top_k = mltfr.selectors[m].projection, mltfr.selectors[m].num_kept
        noise, tau, rows = (
            noise_of(mltfr, m, ids),
            float(mltfr.selectors[m].temperature),
            mltfr.table(m).rows,
        )
        tokens, weights = published.kept(
            u, rows, projection.weight, projection.bias, noise, tau, top_k
        )
        attended.append(published.memory(rows, tokens, weights))
        experts.append(
            published.expert(
                x, attended[m], dict(core.named_parameters()), expert.num_heads, expert.head_dim
            )
        )
    linear, times = mltfr.router.linear, 2 if isinstance(mltfr.router, DoubleSoftmax) else 1
    consensus = None
    if mltfr.consensus is not None:
        shared = published.consensus_memory([attended[m] for m in mltfr.consensus_members])
        parameters = dict(mltfr.consensus.named_buffers())
        consensus = published.expert(x, shared, parameters, expert.num_heads, expert.head_dim)
    pi = published.gate(x, linear.weight, linear.bias, times)
    return (
        published.output(pi, experts, consensus, mltfr.config.consensus.weight) * valid[..., None]
    )


@pytest.mark.parametrize("consensus", [False, True])
@pytest.mark.parametrize(("top_k", "double_softmax"), [(1, False), (3, False), (3, True)])
def test_forward_and_gradients_equal_the_statement(
    top_k: int, double_softmax: bool, consensus: bool
) -> None:
    mltfr = make(top_k, double_softmax=double_softmax, consensus=consensus)
    found_gradients, stated_gradients = [], []
    outputs = []
    for function, gradients in (
        (lambda x: added(mltfr, x, item_ids()), found_gradients),
        (lambda x: stated(mltfr, x, item_ids()), stated_gradients),
    ):
        x = embeddings()
        output = function(x)
        probe = torch.randn(
            output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
        )
        names, parameters = zip(*mltfr.named_parameters(), strict=True)
        gradients += torch.autograd.grad(
            (output * probe).sum(), (x, *parameters), materialize_grads=True
        )
        outputs.append(output)
    torch.testing.assert_close(outputs[0], outputs[1], **EXACT)
    for name, one, other in zip(("x", *names), found_gradients, stated_gradients, strict=True):
        torch.testing.assert_close(
            one, other, **EXACT, msg=lambda text, name=name: f"{name}: {text}"
        )
        reached = float(one.abs().max())
        assert reached > 1e-6 or "key.bias" in name or (top_k == 1 and "selectors" in name), name


def test_with_one_kept_token_no_gradient_reaches_the_filter() -> None:
    """The first of the published defects."""
    mltfr = make(1).float()
    x = embeddings().float()
    added(mltfr, x, item_ids()).square().sum().backward()
    for m, token_filter in enumerate(mltfr.selectors):
        assert (
            token_filter.projection.weight.grad is None
        )  # nothing is spent on it, for it is nothing:
        rows, queries = mltfr.table(m).whole(), x.detach()[:, 0]
        kept = token_filter.select(Queries(queries), rows, torch.arange(len(rows)))
        scores = F.normalize(queries, dim=-1) @ token_filter.project(rows).T
        index, weights = straight_through(scores, token_filter.temperature, 1)
        assert torch.equal(kept.kept, index)
        assert torch.equal(kept.row_weights, weights)
        weights.sum().backward()
        assert token_filter.projection.weight.grad.abs().max() == 0


def test_the_noise_is_the_stated_gumbel_noise_and_is_keyed_by_step_user_and_table() -> None:
    uniform = torch.rand(1000, dtype=torch.float64)
    torch.testing.assert_close(gumbel(uniform), published.gumbel(uniform), **EXACT)
    mltfr = make(3)
    first = [noise_of(mltfr, m, item_ids()) for m in range(3)]
    assert torch.equal(first[0], noise_of(mltfr, 0, item_ids()))
    assert not (first[0][0] == first[0][1]).any()  # users
    assert not (first[0][:, :20] == first[2]).any()  # tables
    for _ in range(7):
        mltfr.after_update(None)
    assert not (first[0] == noise_of(mltfr, 0, item_ids())).any()  # steps
    many = GumbelNoise(torch.arange(500), torch.arange(400), 1.0).of(slice(None)).double()
    assert abs(float(many.mean()) - 0.5772) < 0.02  # Euler's constant
    assert abs(float(many.var()) - 1.6449) < 0.03  # pi^2 / 6


def test_a_user_depends_on_the_batch_and_on_the_future() -> None:
    """Published, and so brought back: the properties that the repaired form has, this one must not
    have.
    """
    mltfr, x = make(3), embeddings().detach()
    together = added(mltfr, x, item_ids())
    alone = added(mltfr, x[:1], item_ids()[:1])
    assert (together[0] - alone[0]).abs().max() > 1e-3
    later = x[:1].clone()
    later[0, 4] = -20 * x[0].sum(0)  # the history's mean turns round
    assert (added(mltfr, later, item_ids()[:1])[0, 0] - alone[0, 0]).abs().max() > 1e-3


def test_bce_equals_the_statement() -> None:
    hidden, positive, negative = torch.randn(3, 11, DIM, dtype=torch.float64).unbind()
    result = (
        binary_cross_entropy(
            hidden, positive, negative[:, None], torch.ones(11, dtype=torch.float64)
        )
        / 11
    )
    torch.testing.assert_close(result, published.bce(hidden, positive, negative), **EXACT)


def test_fisher_and_merge_equal_the_statement(tmp_path: Path) -> None:
    """Over two batches of a real stream, in evaluation mode; the same at any division into
    micro-batches.
    """
    config = as_published(tiny_config(tmp_path, mltfr__consensus__enabled=False), scopes=["method"])
    inputs = load_inputs(config)
    model = build_model(config, inputs, with_consensus=False).double()
    assert model.mltfr is not None
    cores = [core for core in model.mltfr.cores if isinstance(core, ExpertCore)]
    block = BatchLayout(0, 1, 16, 16)

    def steps() -> Iterable[object]:
        return islice(train_stream(config, block).epoch(0), 2)

    result = batch_mean_squares(model, steps(), ONE)  # type: ignore[arg-type]
    model.eval()
    losses = []
    for step in islice(train_stream(config, block).epoch(0), 2):
        batch: SequenceBatch = step.micro_batches[0]
        losses.append(model(batch).terms["loss"].sum / batch.num_targets)
    expected = published.batch_mean_fisher(
        losses, [dict(core.named_parameters()) for core in cores]
    )
    for one, other in zip(result, expected, strict=True):
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], **EXACT)
    assert max(float(v.max()) for v in result[0].values()) > 1e-6
    group = [{name: torch.randn(4, 3, dtype=torch.float64)} for name in ("w",) * 3]
    fishers = [{"w": torch.rand(4, 3, dtype=torch.float64) * 1e-11} for _ in range(3)]
    torch.testing.assert_close(
        merge_unnormalised(group, fishers)["w"], published.merge(group, fishers)["w"], **EXACT
    )
    assert not torch.allclose(merge(group, fishers)["w"], published.merge(group, fishers)["w"])


def procedure(
    config: RunConfig, model_of: Callable[[bool], Recommender], *, by_statement: bool
) -> dict[str, Tensor]:
    """Both stages by plain Adam on whole batches: losses, Fisher, consensus expert, and the
    parameters at each stage's end.
    """
    result: dict[str, Tensor] = {}
    merged: dict[str, Tensor] = {}
    for stage in ("train", "consensus"):
        model = model_of(stage == "consensus")
        mltfr = model.mltfr
        assert mltfr is not None
        if merged:
            mltfr.consensus.load_state_dict(merged)
        if by_statement:
            mltfr.forward = lambda x, packing, m=mltfr: (
                packing.pack(stated(m, packing.unpack(x), packing.item_ids)),
                Routing(
                    m.router(x[:, None])[:, 0],
                    [torch.ones(1, 1)] * len(WIDTHS),
                    len(packing.item_ids),
                ),
            )
        optimizer = torch.optim.Adam(model.parameters(), config.optimizer.learning_rate)
        batches = [
            step.micro_batches[0]
            for step in islice(train_stream(config, BatchLayout(0, 1, 16, 16)).epoch(0), STEPS)
        ]
        losses = []
        for batch in batches:
            losses.append(model(batch).terms["loss"].sum / batch.num_targets)
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
            model.after_update(None)
        result[f"{stage} losses"] = torch.stack(losses).detach()
        result |= {f"{stage} {name}": p.detach() for name, p in model.named_parameters()}
        if stage == "train":
            cores = [
                {name: p.detach() for name, p in mltfr.cores[m].named_parameters()} for m in GROUP
            ]
            if by_statement:
                after = [model(batch).terms["loss"].sum / batch.num_targets for batch in batches]
                fishers = published.batch_mean_fisher(
                    after, [dict(mltfr.cores[m].named_parameters()) for m in GROUP]
                )
                merged = published.merge(cores, fishers)
            else:
                steps = islice(train_stream(config, BatchLayout(0, 1, 16, 16)).epoch(0), STEPS)
                every = batch_mean_squares(model, steps, ONE)
                fishers = [every[m] for m in GROUP]
                merged = merge_unnormalised(cores, fishers)
            result |= {
                f"fisher {m} {name}": t
                for m, f in zip(GROUP, fishers, strict=True)
                for name, t in f.items()
            }
            result |= {f"merged {name}": t for name, t in merged.items()}
    return result


def test_the_two_stages_equal_the_statement(tmp_path: Path) -> None:
    """Stage 1 with a random consensus expert, Fisher, merge, and stage 2 from a fresh start, tables
    trained throughout.
    """
    tables = [
        write_table(tmp_path / "tables", name, num_rows=50, dim=12, seed=7 + i)
        for i, name in enumerate("abc")
    ]
    group = {
        "mltfr__consensus__group": ["a", "b"],
        "mltfr__consensus__weight": LAMBDA,
        "optimizer__learning_rate": 0.01,
    }
    base = tiny_config(tmp_path, mltfr__tables=[str(t) for t in tables], loss__name="bce", **group)
    config = with_values(as_published(base, scopes=["method"]), {"mltfr.filter.top_k": 3})
    inputs = load_inputs(config)

    def model_of(with_consensus: bool) -> Recommender:
        return build_model(config, inputs, with_consensus=with_consensus).double().eval()

    result = procedure(config, model_of, by_statement=False)
    expected = procedure(config, model_of, by_statement=True)
    assert result.keys() == expected.keys()
    for name, value in result.items():
        torch.testing.assert_close(
            value, expected[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}"
        )
    start = dict(model_of(False).named_parameters())
    for block in (
        "mltfr.tables.0.rows",
        "mltfr.selectors.2.projection.weight",
        "mltfr.cores.1.value.weight",
    ):
        assert (result[f"train {block}"] - start[block]).abs().max() > 1e-4, block
        assert (result[f"train {block}"] - result[f"consensus {block}"]).abs().max() > 1e-7, (
            "the stages differ by their expert"
        )
