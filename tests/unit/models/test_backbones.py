"""What every backbone must hold: causality or masking, blindness to padding and other rows, one
injection point.
"""

from __future__ import annotations

import re
import sys
import textwrap
import types
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import new_model, with_loss
from torch import Tensor
from torch.nn import functional as F

from mltfr_dist.backbones import BACKBONES, Entry
from mltfr_dist.config import (
    BackboneConfig,
    ExpertConfig,
    FilterConfig,
    LossConfig,
    MLTFRConfig,
    RunConfig,
)
from mltfr_dist.data.batch import RankingBatch, SequenceBatch
from mltfr_dist.errors import CheckpointError, ConfigError
from mltfr_dist.losses import LOSSES
from mltfr_dist.models.backbone import Backbone, PositionalBackbone, backbone_class
from mltfr_dist.models.bert4rec import BERT4Rec
from mltfr_dist.models.esasrec import LiGRBlock
from mltfr_dist.models.fmlp import SequenceFilter
from mltfr_dist.models.linrec import CausalLinearAttention, causal_product
from mltfr_dist.models.packing import Packing
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.schema import validate

NUM_ITEMS, MAX_LEN, DIM, MASK = 30, 10, 16, 31
HISTORY = st.lists(st.integers(1, NUM_ITEMS), min_size=1, max_size=MAX_LEN)
SCORED = [name for name, entry in BACKBONES.items() if not entry.reads_future]
"""At every position; test_padded has the others."""
CAUSAL = [name for name in SCORED if backbone_class(name).objective == "next_item"]
few = settings(max_examples=10, deadline=None, derandomize=True)
every = pytest.mark.parametrize("name", SCORED)
bare_and_with = pytest.mark.parametrize("with_mltfr", [False, True], ids=["bare", "mltfr"])


@cache
def recommender(name: str, with_mltfr: bool = False, **fields: object) -> Recommender:
    """In float64 and with weights far from their start, so that a leak would show."""
    torch.manual_seed(0)
    tables = [torch.randn(40, 12), torch.randn(30, 8)]
    mltfr = MLTFRConfig(
        enabled=with_mltfr,
        tables=("a", "b"),
        filter=FilterConfig(top_k=4, query_every=3, shortlist_size=None, temperature=0.1),
        expert=ExpertConfig(num_heads=2, head_dim=4),
    )
    if name == "cl4srec":
        fields = {"cl4srec": {"contrast_group": 2}}
    backbone = BackboneConfig(name=name, hidden_dim=DIM, dropout=0.3, **fields)
    made = new_model(
        backbone,
        mltfr,
        LossConfig(),
        num_items=NUM_ITEMS,
        max_len=MAX_LEN,
        table_rows=tables if with_mltfr else [],
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        made.backbone.item_embedding.weight[0] = 0
    return made.double().eval()


def padded(histories: list[list[int]], width: int = 0) -> Tensor:
    width = max(width, 1, *(len(h) for h in histories))
    return torch.tensor([h + [0] * (width - len(h)) for h in histories])


def output(model: Recommender, item_ids: Tensor) -> Tensor:
    """Hidden states [B, L, D], zero at padding."""
    with torch.no_grad():
        hidden, packing, _ = model.hidden(item_ids)
        return packing.unpack(hidden)


def ranking(histories: list[list[int]], width: int = 0) -> RankingBatch:
    none = torch.zeros(0).long()
    return RankingBatch(padded(histories, width), torch.ones(len(histories)).long(), none, none)


# --- what holds for all
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_the_registry_leads_to_a_backbone_that_cites_its_paper(name: str) -> None:
    made = backbone_class(name)
    assert issubclass(made, Backbone)
    assert made.objective in ("next_item", "cloze")
    module = __import__(made.__module__, fromlist=["_"])
    assert "arXiv" in module.__doc__
    assert "mltfr_dist.models.mltfr" not in module.__dict__.get("__file__", "")
    assert any(year in BACKBONES[name].paper for year in map(str, range(2018, 2027)))


def test_an_unknown_backbone_names_the_valid_ones() -> None:
    with pytest.raises(
        ConfigError,
        match=r"`backbone.name`: backbones are sasrec, .*; the nearest is `sasrec` .*'sasrek'",
    ) as caught:
        validate(
            RunConfig,
            {"data": {"path": "d"}, "mltfr": {"enabled": False}, "backbone": {"name": "sasrek"}},
            source="a test",
        )
    assert all(name in str(caught.value) for name in BACKBONES)


@pytest.mark.parametrize("name", CAUSAL)
@bare_and_with
@few
@given(history=HISTORY, data=st.data())
def test_a_later_item_changes_no_earlier_position(
    name: str, with_mltfr: bool, history: list[int], data: st.DataObject
) -> None:
    model = recommender(name, with_mltfr)
    place = data.draw(st.integers(0, len(history) - 1))
    other = history.copy()
    other[place] = history[place] % NUM_ITEMS + 1
    before, after = output(model, padded([history]))[0], output(model, padded([other]))[0]
    torch.testing.assert_close(after[:place], before[:place], rtol=0, atol=1e-11)
    assert (after[place:] - before[place:]).abs().amax(
        1
    ).min() > 1e-6  # and every later one sees it


@every
@bare_and_with
@few
@given(histories=st.lists(HISTORY, min_size=1, max_size=4), width=st.integers(0, MAX_LEN))
def test_padding_and_other_rows_change_nothing(
    name: str, with_mltfr: bool, histories: list[list[int]], width: int
) -> None:
    model = recommender(name, with_mltfr)
    together = output(model, padded([*histories, []], width))
    for row, history in zip(together, histories):
        torch.testing.assert_close(
            row[: len(history)], output(model, padded([history]))[0], rtol=0, atol=1e-11
        )
        assert row[len(history) :].abs().sum() == 0
    assert together[-1].abs().sum() == 0


@every
@bare_and_with
def test_a_rank_may_have_nothing_but_padding(name: str, with_mltfr: bool) -> None:
    model = recommender(name, with_mltfr)
    assert output(model, torch.zeros(3, 4, dtype=torch.int64)).abs().sum() == 0


@every
@bare_and_with
@few
@given(histories=st.lists(HISTORY, min_size=1, max_size=4), width=st.integers(0, MAX_LEN))
def test_scores_are_the_same_alone_and_name_real_items_only(
    name: str, with_mltfr: bool, histories: list[list[int]], width: int
) -> None:
    model = recommender(name, with_mltfr)
    with torch.no_grad():
        together = model(ranking([*histories, []], width))
        assert together.shape == (len(histories) + 1, NUM_ITEMS + 1)  # no column for a mask
        assert torch.isneginf(together[:, 0]).all()
        assert torch.isfinite(together[:, 1:]).all()
        for row, history in zip(together, histories):
            torch.testing.assert_close(row, model(ranking([history]))[0], rtol=0, atol=1e-10)


@every
def test_in_fp32_a_user_is_the_same_in_any_batch(name: str) -> None:
    model = new_model(
        BackboneConfig(name=name, hidden_dim=DIM),
        MLTFRConfig(enabled=False),
        LossConfig(),
        num_items=NUM_ITEMS,
        max_len=MAX_LEN,
        table_rows=[],
    ).eval()
    histories = [[1, 2, 3], [4], list(range(1, MAX_LEN + 1))]
    with torch.no_grad():
        together = model(ranking(histories))
        for row, history in zip(together, histories, strict=True):
            torch.testing.assert_close(row, model(ranking([history]))[0], rtol=0, atol=1e-6)


@every
def test_mltfr_joins_after_the_first_block_only(name: str) -> None:
    model, item_ids = recommender.__wrapped__(name, False), padded([[1, 2, 3], [4]])
    backbone, seen = model.backbone, []

    def mltfr(x: Tensor, packing: Packing) -> tuple[Tensor, None]:
        seen.append(x)
        assert torch.equal(packing.valid_mask, item_ids != 0)
        assert torch.equal(packing.item_ids, item_ids)
        return x.cos(), None  # not constant, which a norm would take away

    with torch.no_grad():
        bare, packing, _ = model.hidden(item_ids)
        model.__dict__["mltfr"] = mltfr  # in place of a module
        hidden, _, _ = model.hidden(item_ids)
        inputs, _ = backbone.inputs(item_ids)
        expected = backbone.blocks[0](inputs, packing) + inputs.cos()
        for block in list(backbone.blocks)[1:]:
            expected = block(expected, packing)
        torch.testing.assert_close(hidden, backbone.finish(expected))
        assert len(seen) == 1
        assert torch.equal(seen[0], inputs)
        assert not torch.allclose(hidden, bare)


@every
@bare_and_with
def test_every_parameter_learns_and_the_full_length_fits(name: str, with_mltfr: bool) -> None:
    model = recommender(name, with_mltfr)
    width = MAX_LEN + (name == "bert4rec")
    items = torch.randint(1, NUM_ITEMS + 1, (4, width), generator=torch.Generator().manual_seed(0))
    targets = items.roll(-1, 1)
    if name == "bert4rec":
        masked = torch.arange(width) % 3 == 0
        items, targets = torch.where(masked, MASK, items), torch.where(masked, items, 0)
    views = None
    if backbone_class(name).contrasts_views:
        views = torch.stack(
            [items.roll(1, 1), torch.where(torch.arange(width) % 2 == 0, MASK, items)], dim=1
        )
    result = model(SequenceBatch(items, targets, torch.arange(4), view_ids=views))
    contrast = result.terms.get("contrast_loss")
    total = result.terms["loss"].sum + (0 if contrast is None else contrast.sum)
    model.zero_grad()
    total.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
    model.zero_grad()


@every
def test_dropout_acts_in_training_only(name: str) -> None:
    fresh = backbone_class(name)(
        BackboneConfig(name=name, hidden_dim=DIM, dropout=0.5), NUM_ITEMS, MAX_LEN
    )
    whole = Recommender(fresh, None, LossConfig(), num_items=NUM_ITEMS)
    item_ids = padded([[1, 2, 3]])
    assert not torch.equal(whole.hidden(item_ids)[0], whole.hidden(item_ids)[0])
    whole.eval()
    assert torch.equal(whole.hidden(item_ids)[0], whole.hidden(item_ids)[0])
    assert isinstance(fresh, PositionalBackbone)
    assert fresh.item_embedding.weight[0].abs().sum() == 0


# --- each one's own
# ----------------------------------------------------------------------------------------------


def test_esasrec_gates_what_a_sub_layer_adds() -> None:
    torch.manual_seed(0)
    block = LiGRBlock(DIM, 2, 0.0).double()
    item_ids = padded([[1, 2, 3]])
    x = torch.randn(3, DIM, dtype=torch.float64)
    packing = Packing(item_ids)
    with torch.no_grad():
        middle = x + block.attention(block.attention_norm(x), packing) * torch.sigmoid(
            block.attention_gate(x)
        )
        gate, inner = block.feed_forward.gate_and_inner(block.feed_forward_norm(middle)).chunk(
            2, -1
        )
        swiglu = block.feed_forward.out(gate * torch.sigmoid(gate) * inner)
        expected = middle + swiglu * torch.sigmoid(block.feed_forward_gate(middle))
        torch.testing.assert_close(block(x, packing), expected)
        for linear in (block.attention_gate, block.feed_forward_gate):
            linear.bias.fill_(-1e3)  # closed gates leave the stream alone
        torch.testing.assert_close(block(x, packing), x)


@pytest.mark.parametrize("length", [1, 5, 64, 65, 200])
def test_linrecs_chunks_equal_the_plain_sum(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (
        torch.randn(2, 3, length, 4, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    torch.testing.assert_close(causal_product(q, k, v), (q @ k.transpose(2, 3)).tril() @ v)


def test_linrec_is_the_published_attention_of_each_prefix() -> None:
    torch.manual_seed(0)
    made = CausalLinearAttention(DIM, 2).double()
    x = torch.randn(7, DIM, dtype=torch.float64)
    with torch.no_grad():
        result = made(x, Packing(padded([[1] * 7])))
        for t in range(7):
            query, key, value = (
                p.view(t + 1, 2, DIM // 2).transpose(0, 1)
                for p in made.qkv(x[: t + 1]).chunk(3, -1)
            )
            query, key = torch.nn.functional.elu(query), torch.nn.functional.elu(key)
            query = query / query.norm(dim=2, keepdim=True)  # each row
            key = (
                key / (1 + key.square().sum(dim=1, keepdim=True)).sqrt()
            )  # each column, over the prefix
            mixed = query @ (key.transpose(1, 2) @ value)  # the product that makes it linear
            torch.testing.assert_close(result[t], made.out(mixed.transpose(0, 1).flatten(1))[t])


def test_fmlps_filter_is_a_causal_convolution() -> None:
    torch.manual_seed(0)
    made = SequenceFilter(3, MAX_LEN).double()
    for length in (1, 4, MAX_LEN):
        x = torch.randn(2, length, 3, dtype=torch.float64)
        expected = torch.stack(
            [sum(made.kernel[t - s] * x[:, s] for s in range(t + 1)) for t in range(length)], dim=1
        )
        torch.testing.assert_close(made(x), expected)
    assert made(x.bfloat16()).dtype == torch.bfloat16  # the transform itself knows no bf16


def test_bsarecs_low_pass_is_the_published_one_at_the_end_of_each_prefix() -> None:
    """Theirs transforms whole sequences, padded in front."""
    x = torch.randn(MAX_LEN, 5)
    for count in (1, 2, 3):
        model = recommender.__wrapped__("bsarec", bsarec={"low_frequencies": count})
        low_pass = model.backbone.blocks[0].filter.low_pass.float()
        assert torch.equal(low_pass, low_pass.tril())
        for t in range(MAX_LEN):
            spectrum = torch.fft.rfft(F.pad(x[: t + 1], (0, 0, MAX_LEN - t - 1, 0)), dim=0)
            spectrum[count:] = 0
            torch.testing.assert_close(
                (low_pass @ x)[t], torch.fft.irfft(spectrum, n=MAX_LEN, dim=0)[-1]
            )


def test_a_bsarec_of_another_filter_is_refused() -> None:
    model = recommender("bsarec")
    former = {k: v for k, v in model.state_dict().items() if not k.endswith("low_pass")}
    with pytest.raises(CheckpointError, match="trained by an older release") as caught:
        model.load_state_dict(former)
    assert "train it anew" in caught.value.remedy


@pytest.mark.parametrize("change", [{"inductive_bias": 0.2}, {"low_frequencies": 1}])
def test_bsarecs_fields_have_an_effect(change: dict[str, float]) -> None:
    item_ids = padded([list(range(1, MAX_LEN + 1))])
    assert not torch.allclose(
        output(recommender("bsarec"), item_ids),
        output(recommender.__wrapped__("bsarec", bsarec=change), item_ids),
    )


@few
@given(history=HISTORY, data=st.data())
def test_bert4rec_reads_both_sides_and_never_a_masked_item(
    history: list[int], data: st.DataObject
) -> None:
    """The hidden item is nowhere in the input: what stands at a masked place is the mask, with
    MLTFR's query as well.
    """
    model = recommender("bert4rec", True)
    place = data.draw(st.integers(0, len(history) - 1))
    masked = [*history[:place], MASK, *history[place + 1 :]]
    shown = output(model, padded([masked]))[0]
    for other in range(len(history)):
        if other != place:
            changed = masked.copy()
            changed[other] = history[other] % NUM_ITEMS + 1
            assert (output(model, padded([changed]))[0][place] - shown[place]).abs().max() > 1e-7
    targets = torch.zeros(1, len(history)).long()
    losses = []
    for target in (1, 2):
        targets[0, place] = target
        batch = SequenceBatch(padded([masked]), targets, torch.zeros(1).long())
        losses.append(model(batch).terms["loss"].sum.item())
    scores = model.backbone.item_embedding.weight[1 : NUM_ITEMS + 1] @ shown[place]
    for target, loss in zip((1, 2), losses, strict=True):
        expected = torch.nn.functional.cross_entropy(scores, torch.tensor(target - 1))
        assert loss == pytest.approx(
            expected.item(), rel=1e-5
        )  # the masked position alone is scored


def test_bert4rec_ranks_at_a_mask_behind_the_last_item() -> None:
    model = recommender("bert4rec")
    assert isinstance(model.backbone, BERT4Rec)
    read = model.backbone.for_ranking(padded([[5, 6], [7], []]))
    assert read.tolist() == [[5, 6, MASK], [7, MASK, 0], [MASK, 0, 0]]
    full = list(range(1, MAX_LEN + 1))
    with torch.no_grad():
        for history in ([5, 6], [7], full):
            state = output(model, padded([[*history, MASK]]))[0, len(history)]
            expected = model.backbone.item_embedding.weight[1 : NUM_ITEMS + 1] @ state
            torch.testing.assert_close(model(ranking([history, [1, 2, 3]]))[0, 1:], expected)


def test_explanations_are_made_where_ranking_reads() -> None:
    for name, place in (("sasrec", 2), ("bert4rec", 3)):
        model = recommender(name, True)
        (explanation,) = model.explain(padded([[1, 2, 3]]))
        read = model.backbone.for_ranking(padded([[1, 2, 3]]))
        with torch.no_grad():
            gates = model.mltfr.router(model.backbone.inputs(read)[0][place])
        torch.testing.assert_close(explanation.gate_weights.double(), gates, rtol=0, atol=1e-6)


def test_cl4srec_ranks_as_sasrec_does() -> None:
    """The views are a matter of training: with the same weights, the scores are SASRec's."""
    contrasting = recommender("cl4srec")
    plain = backbone_class("sasrec")(BackboneConfig(hidden_dim=DIM), NUM_ITEMS, MAX_LEN)
    state = contrasting.backbone.state_dict()
    plain.double().eval().load_state_dict(
        state | {"item_embedding.weight": state["item_embedding.weight"][: NUM_ITEMS + 1]}
    )
    item_ids = padded([[1, 2, 3], [4]])
    result = Recommender(plain, None, LossConfig(), num_items=NUM_ITEMS).hidden(item_ids)[0]
    torch.testing.assert_close(contrasting.hidden(item_ids)[0], result)


# --- losses through the whole recommender
# ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].negatives != "none"])
def test_a_loss_whose_batch_holds_no_negatives_says_what_its_line_lacks(name: str) -> None:
    model = with_loss(recommender("sasrec"), LossConfig(name=name))
    batch = SequenceBatch(torch.tensor([[1, 2]]), torch.tensor([[2, 3]]), torch.arange(1))
    with pytest.raises(ConfigError, match=f"loss.name={name} reads negatives") as caught:
        model(batch)
    assert f'Give the line of `{name}` negatives="{LOSSES[name].negatives}"' in str(caught.value)


@pytest.mark.parametrize("name", ["sampled_softmax", "gbce"])
@pytest.mark.parametrize("change", [{}, {"calibration": 0.1}], ids=["as is", "calibration"])
def test_the_loss_is_a_weighted_sum_over_scored_positions(
    name: str, change: dict[str, float]
) -> None:
    made = recommender("sasrec")
    generator = torch.Generator().manual_seed(0)
    items = padded([[1, 2, 3, 4], [5, 6]])
    targets = torch.tensor([[2, 0, 4, 5], [6, 7, 0, 0]])  # one real position is not scored
    negatives = torch.randint(1, NUM_ITEMS + 1, (2, 4, 3), generator=generator)
    shared, logarithms = torch.tensor([4, 9, 9]), torch.tensor([-1.0, -2.0, -2.0])
    weights = torch.rand(2, 4, generator=generator)
    batch = SequenceBatch(items, targets, torch.arange(2), negatives, shared, logarithms)
    vectors, hidden = made.backbone.item_embedding.weight, output(made, items)
    expected = 0.0
    with torch.no_grad():
        for user, t in (targets != 0).nonzero().tolist():
            state, target = hidden[user, t], int(targets[user, t])
            positive = vectors[target] @ state
            if name == "gbce":
                beta = 1 - change.get("calibration", 0.75) * (1 - 3 / (NUM_ITEMS - 1))
                terms = [
                    -beta * positive.sigmoid().log(),
                    *(-(-vectors[i] @ state).sigmoid().log() for i in negatives[user, t]),
                ]
                loss = sum(float(v) for v in terms) / 4
            else:
                kept = [
                    (i, q)
                    for i, q in zip(shared.tolist(), logarithms.tolist(), strict=True)
                    if i != target
                ]
                logits = [
                    positive,
                    *(vectors[i] @ state - q - torch.tensor(3.0).log() for i, q in kept),
                ]
                loss = float(torch.stack(logits).logsumexp(0) - positive)
            expected += float(weights[user, t]) * loss
        made = with_loss(made, LossConfig(name=name, **change))
        assert made(batch, weights).terms["loss"].sum.item() == pytest.approx(expected, rel=1e-6)


def test_contrast_is_of_the_states_at_the_ends_of_the_views() -> None:
    made = recommender("cl4srec")
    views = torch.tensor(
        [
            [[1, 2, 0], [1, MASK, 3]],
            [[5, 0, 0], [4, 5, 6]],
            [[7, 8, 0], [8, 7, 0]],
            [[0, 0, 0], [0, 0, 0]],
        ]
    )
    ids = torch.tensor([3, 8, 1, -1])
    batch = SequenceBatch(
        padded([[1], [2], [3], []]), padded([[2], [3], [4], []]), ids, view_ids=views
    )
    ends = torch.stack(
        [output(made, row[row != 0][None])[0, -1] for row in views[:3].flatten(0, 1)]
    ).view(3, 2, DIM)

    def loss(anchor: Tensor, other: Tensor, negatives: list[Tensor]) -> float:
        return float(
            torch.stack([anchor @ v for v in (other, *negatives)]).logsumexp(0) - anchor @ other
        )

    expected = sum(
        loss(ends[p, v], ends[p, 1 - v], list(ends[1 - p])) / 2 for p in range(2) for v in range(2)
    )  # the third is alone in its group: nothing to tell it from
    assert made(batch).terms["contrast_loss"].sum.item() == pytest.approx(expected, rel=1e-6)
    assert "contrast_loss" not in made(batch._replace(view_ids=None)).terms


# --- adding one
# ------------------------------------------------------------------------------------------------


def test_the_example_of_contributing_is_a_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One file and one registry line, word for word as CONTRIBUTING.md shows them."""
    text = (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text()
    source = textwrap.dedent(text.partition("```python\n")[2].partition("```")[0])
    line = re.search(r'`"mybackbone": (Entry\(.*?\)),`', text)
    assert line
    monkeypatch.setitem(BACKBONES, "mybackbone", eval(line.group(1), {"Entry": Entry}))
    module = types.ModuleType("mltfr_dist.models.mybackbone")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(source, module.__dict__)
    model = recommender.__wrapped__("mybackbone", True)
    before, after = (
        output(model, padded([[1, 2, 3, 4]]))[0],
        output(model, padded([[1, 2, 9, 4]]))[0],
    )
    torch.testing.assert_close(after[:2], before[:2], rtol=0, atol=1e-12)
    assert (after[2:] - before[2:]).abs().amax(1).min() > 1e-6
    torch.testing.assert_close(output(model, padded([[1, 2, 3, 4]], 9))[0, :4], before)
