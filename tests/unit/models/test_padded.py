"""The published forms of FMLP-Rec, BSARec and LinRec, against their formulas, in loops."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable

import pytest
import torch
from support import new_model
from torch import Tensor, nn

from mltfr_dist.config import (
    BackboneConfig,
    ExpertConfig,
    FilterConfig,
    LossConfig,
    MLTFRConfig,
    RunConfig,
)
from mltfr_dist.data.batch import RankingBatch, SequenceBatch
from mltfr_dist.errors import ConfigError
from mltfr_dist.models.packing import Packing, Padded
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.schema import validate

NUM_ITEMS, WIDTH, DIM, HEADS = 20, 7, 6, 2
HISTORIES = [[3, 1, 4], [5], [2, 6, 5, 3, 5, 8, 9]]
"""Shorter than the sequence, and as long."""
State = dict[str, Tensor]
every = pytest.mark.parametrize("name", ["fmlp", "bsarec", "linrec"])
bare_and_with = pytest.mark.parametrize("with_mltfr", [False, True], ids=["bare", "mltfr"])


def recommender(name: str, with_mltfr: bool = False, width: int = WIDTH) -> Recommender:
    """In float64, with weights far from their start."""
    torch.manual_seed(0)
    made = new_model(
        BackboneConfig(
            name=f"{name}_original",
            hidden_dim=DIM,
            num_heads=HEADS,
            bsarec={"low_frequencies": 2} if name == "bsarec" else {},
        ),
        MLTFRConfig(
            enabled=with_mltfr,
            tables=("a", "b"),
            filter=FilterConfig(top_k=4, query_every=3, shortlist_size=None, temperature=0.1),
            expert=ExpertConfig(num_heads=2, head_dim=4),
        ),
        LossConfig(),
        num_items=NUM_ITEMS,
        max_len=width,
        table_rows=[torch.randn(40, 12), torch.randn(30, 8)] if with_mltfr else [],
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        made.backbone.item_embedding.weight[0] = 0
    return made.double().eval()


def rows(histories: list[list[int]], width: int = 0) -> Tensor:
    width = max(width, *(len(h) for h in histories))
    return torch.tensor([h + [0] * (width - len(h)) for h in histories])


def scores(model: Recommender, item_ids: Tensor) -> Tensor:
    none = torch.zeros(0).long()
    with torch.no_grad():
        return model(RankingBatch(item_ids, torch.ones(len(item_ids)).long(), none, none))


# --- the formulas ----------------------------------------------------------------------------


def norm(x: Tensor, state: State, name: str) -> Tensor:
    """Of one position [D]."""
    centred = x - x.mean()
    scaled = centred / (centred.square().mean() + 1e-12).sqrt()
    return state[f"{name}.weight"] * scaled + state[f"{name}.bias"]


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return state[f"{name}.weight"] @ x + state[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def feed_forward(x: Tensor, state: State, block: str) -> Tensor:
    inner = gelu(linear(x, state, f"{block}.feed_forward.0"))
    outer = linear(inner, state, f"{block}.feed_forward.2")
    return norm(outer + x, state, f"{block}.feed_forward_norm")


def spectrum(x: list[Tensor]) -> list[Tensor]:
    """All components of a sequence, by the definition, scaled as an orthogonal transform."""
    size = len(x)
    return [
        sum(x[t] * cmath.exp(-2j * math.pi * k * t / size) for t in range(size)) / math.sqrt(size)
        for k in range(size)
    ]


def sequence(components: list[Tensor]) -> list[Tensor]:
    """The real sequence whose first components are given: the others are their conjugates."""
    size = WIDTH
    whole = [components[k] if k <= size // 2 else components[size - k].conj() for k in range(size)]
    return [
        (sum(whole[k] * cmath.exp(2j * math.pi * k * t / size) for k in range(size))).real
        / math.sqrt(size)
        for t in range(size)
    ]


def fmlp_layer(x: list[Tensor], ids: list[int], state: State, block: str) -> list[Tensor]:
    weight = state[f"{block}.filter.complex_weight"]
    half = [
        component * torch.complex(weight[k, :, 0], weight[k, :, 1])
        for k, component in enumerate(spectrum(x)[: WIDTH // 2 + 1])
    ]
    half[0] = half[0].real + 0j  # an inverse real transform reads no imaginary part there
    return [norm(y + x[t], state, f"{block}.filter_norm") for t, y in enumerate(sequence(half))]


def heads(x: Tensor, state: State, block: str) -> list[Tensor]:
    """Query, key and value of one position, each [H, d]."""
    return list(linear(x, state, f"{block}.attention.qkv").view(3, HEADS, DIM // HEADS))


def bsarec_layer(x: list[Tensor], ids: list[int], state: State, block: str) -> list[Tensor]:
    kept = [y if k < 2 else 0 * y for k, y in enumerate(spectrum(x)[: WIDTH // 2 + 1])]
    beta = state[f"{block}.filter.beta"]
    qkv = [heads(position, state, block) for position in x]
    result = []
    for t, low in enumerate(sequence(kept)):
        filtered = norm(low + beta**2 * (x[t] - low) + x[t], state, f"{block}.filter_norm")
        mixed = []
        for h in range(HEADS):
            logits = torch.stack(
                [
                    qkv[t][0][h] @ qkv[s][1][h] / math.sqrt(DIM // HEADS)
                    - (0 if s <= t and ids[s] else 10000)
                    for s in range(WIDTH)
                ]
            )
            weights = torch.softmax(logits, 0)
            mixed.append(sum(weights[s] * qkv[s][2][h] for s in range(WIDTH)))
        attended = linear(torch.cat(mixed), state, f"{block}.attention.out")
        attended = norm(attended + x[t], state, f"{block}.attention_norm")
        result.append(0.7 * filtered + 0.3 * attended)
    return result


def linrec_layer(x: list[Tensor], ids: list[int], state: State, block: str) -> list[Tensor]:
    qkv = [[nn.functional.elu(q), nn.functional.elu(k), v] for q, k, v in
           (heads(position, state, block) for position in x)]  # fmt: skip
    result = []
    for t in range(WIDTH):
        mixed = []
        for h in range(HEADS):
            query = qkv[t][0][h] / qkv[t][0][h].norm()
            keys = [qkv[s][1][h] / qkv[s][1][h].norm() for s in range(WIDTH)]
            total = sum((query @ keys[s]) * qkv[s][2][h] for s in range(WIDTH))
            mixed.append(total / math.sqrt(DIM // HEADS))
        attended = linear(torch.cat(mixed), state, f"{block}.attention.out")
        result.append(norm(attended + x[t], state, f"{block}.attention_norm"))
    return result


LAYERS: dict[str, Callable[[list[Tensor], list[int], State, str], list[Tensor]]] = {
    "fmlp": fmlp_layer,
    "bsarec": bsarec_layer,
    "linrec": linrec_layer,
}


def published(name: str, model: Recommender, history: list[int]) -> Tensor:
    """Scores of the items after one history."""
    state = {k.removeprefix("backbone."): v for k, v in model.state_dict().items()}
    padding = [0] * (WIDTH - len(history))
    ids = [*history, *padding] if name == "linrec" else [*padding, *history]
    embedding, positions = state["item_embedding.weight"], state["position_embedding.weight"]
    x = [norm(embedding[i] + positions[t], state, "input_norm") for t, i in enumerate(ids)]
    for layer in range(2):
        x = LAYERS[name](x, ids, state, f"blocks.{layer}")
        x = [feed_forward(y, state, f"blocks.{layer}") for y in x]
    return embedding[1:] @ (x[len(history) - 1] if name == "linrec" else x[-1])


@every
def test_scores_are_those_of_the_published_formulas(name: str) -> None:
    model = recommender(name)
    result = scores(model, rows(HISTORIES))
    for row, history in zip(result, HISTORIES, strict=True):
        expected = published(name, model, history)
        torch.testing.assert_close(row[1:], expected, rtol=0, atol=1e-10)


def test_the_filter_starts_with_the_published_gain() -> None:
    torch.manual_seed(0)
    model = new_model(
        BackboneConfig(name="fmlp_original"),
        MLTFRConfig(enabled=False),
        LossConfig(),
        num_items=NUM_ITEMS,
        max_len=50,
        table_rows=[],
    )
    weight = model.backbone.blocks[0].filter.complex_weight
    assert weight.shape == (26, 64, 2)
    assert weight.square().sum(-1).mean().sqrt().item() == pytest.approx(0.0283, rel=0.05)


# --- what holds for any backbone --------------------------------------------------------------


@every
@bare_and_with
def test_padding_and_other_rows_change_nothing(name: str, with_mltfr: bool) -> None:
    model = recommender(name, with_mltfr)
    together = scores(model, rows([*HISTORIES, []], WIDTH))
    for row, history in zip(together, HISTORIES):
        alone = scores(model, torch.tensor([history]))[0]
        torch.testing.assert_close(row, alone, rtol=0, atol=1e-11)
        other = scores(model, torch.tensor([[history[0] % NUM_ITEMS + 1, *history[1:]]]))[0]
        assert (other - alone)[1:].abs().max() > 1e-6
    assert torch.isfinite(together[:, 1:]).all()


@every
@bare_and_with
@pytest.mark.parametrize("last", [[], [7]], ids=["nothing", "an item"])
def test_the_last_position_alone_teaches_every_parameter(
    name: str, with_mltfr: bool, last: list[int]
) -> None:
    model = recommender(name, with_mltfr)
    items = rows([*HISTORIES, last], WIDTH)
    targets = torch.zeros_like(items)
    for row, history in enumerate([*HISTORIES, last]):
        if history:
            targets[row, len(history) - 1] = row + 1
    result = model(SequenceBatch(items, targets, torch.arange(4)))
    result.terms["loss"].sum.backward()
    expected = [
        nn.functional.cross_entropy(scores(model, torch.tensor([h]))[0, 1:], torch.tensor(row))
        for row, h in enumerate([*HISTORIES, last])
        if h
    ]
    assert result.terms["loss"].sum.item() == pytest.approx(sum(expected).item(), rel=1e-10)
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name


@every
@bare_and_with
def test_a_batch_may_hold_nothing_but_padding(name: str, with_mltfr: bool) -> None:
    model = recommender(name, with_mltfr)
    nothing = torch.zeros(3, 4, dtype=torch.int64)
    result = model(SequenceBatch(nothing, nothing, torch.full((3,), -1)))
    result.terms["loss"].sum.backward()
    assert result.terms["loss"].sum.item() == 0


@every
def test_mltfr_joins_at_the_real_positions(name: str) -> None:
    model, item_ids = recommender(name), rows(HISTORIES)
    backbone, seen = model.backbone, []

    def mltfr(x: Tensor, packing: Packing) -> tuple[Tensor, None]:
        assert torch.equal(packing.valid_mask, item_ids != 0)
        assert packing.lengths is None, "nobody counted"
        seen.append(x)
        return x.cos(), None

    model.__dict__["mltfr"] = mltfr  # in place of a module
    with torch.no_grad():
        hidden, packing, _ = model.hidden(item_ids)
        layout = Padded(item_ids, WIDTH, in_front=name != "linrec")
        inputs = backbone.embed(layout.item_ids.flatten(), layout.columns)
        real = (layout.item_ids != 0).flatten()[:, None]
        expected = backbone.blocks[0](inputs, layout) + real * inputs.cos()
        expected = backbone.blocks[1](expected, layout)[real[:, 0]]
    torch.testing.assert_close(hidden, expected)
    assert torch.equal(packing.valid_mask, item_ids != 0)
    (read,) = seen
    assert torch.equal(read, backbone.inputs(item_ids)[0])
    assert torch.equal(read, inputs[real[:, 0]])


@every
def test_dropout_acts_in_training_only(name: str) -> None:
    model, item_ids = recommender(name), rows(HISTORIES)
    assert torch.equal(model.hidden(item_ids)[0], model.hidden(item_ids)[0])
    model.train()
    assert not torch.equal(model.hidden(item_ids)[0], model.hidden(item_ids)[0])


@every
def test_what_would_show_the_future_is_refused(name: str) -> None:
    values = {
        "data": {"path": "d"},
        "mltfr": {"enabled": False},
        "backbone": {"name": f"{name}_original"},
    }
    with pytest.raises(ConfigError, match=r"give data\.samples prefixes, or the causal form"):
        validate(RunConfig, values, source="a test")
