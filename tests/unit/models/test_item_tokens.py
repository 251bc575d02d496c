"""Item-side tokens: what a backbone reads and is scored against, whatever the loss and the
backbone.
"""

from __future__ import annotations

import pytest
import torch
from support import new_model, with_loss
from torch import Tensor, nn

from mltfr_dist.backbones import BACKBONES
from mltfr_dist.config import BackboneConfig, ExpertConfig, FilterConfig, LossConfig, MLTFRConfig
from mltfr_dist.data.batch import RankingBatch, SequenceBatch
from mltfr_dist.models.item_tokens import ItemVectors
from mltfr_dist.models.output import TrainingOutput
from mltfr_dist.models.recommender import Recommender

NUM_ITEMS, DIM, COLUMNS = 12, 8, 5
WITHOUT = 7
"""An item that has no token."""
ITEMS = torch.tensor([[3, 7, 3, 1], [2, 12, 0, 0]])
TARGETS = torch.tensor([[7, 3, 1, 5], [12, 4, 0, 0]])


def features() -> Tensor:
    made = torch.randn(NUM_ITEMS + 1, COLUMNS, generator=torch.Generator().manual_seed(1))
    made[[0, WITHOUT]] = 0
    return made


def make(
    backbone: str = "sasrec", item_features: Tensor | None = None, loss: LossConfig | None = None
) -> Recommender:
    torch.manual_seed(0)
    mltfr = MLTFRConfig(
        tables=("a",),
        filter=FilterConfig(top_k=2, shortlist_size=None),
        expert=ExpertConfig(num_heads=2, head_dim=2),
    )
    made = new_model(
        BackboneConfig(name=backbone, hidden_dim=DIM),
        mltfr,
        loss or LossConfig(),
        num_items=NUM_ITEMS,
        max_len=4,
        table_rows=[torch.randn(9, 6)],
        item_features=item_features,
    )
    return made.double().eval()


def folded(model: Recommender) -> Recommender:
    """A model without item tokens, whose embedding holds what item tokens make of it: the naive
    restatement.
    """
    vectors = model.backbone.item_embedding
    assert isinstance(vectors, ItemVectors)
    state = {
        name: value for name, value in model.state_dict().items() if ".item_embedding." not in name
    }
    own = vectors.embedding.weight.detach().clone()
    for item, row in enumerate(features().double()):
        for d in range(DIM):
            own[item, d] += sum(
                vectors.adapter.weight[d, c].item() * row[c] for c in range(COLUMNS)
            )
    plain = make(model_name(model))
    plain.load_state_dict(state | {"backbone.item_embedding.weight": own})
    return plain


def model_name(model: Recommender) -> str:
    return next(
        name
        for name, entry in BACKBONES.items()
        if entry.path.endswith(f":{type(model.backbone).__name__}")
    )


def training_batch(**fields: Tensor) -> SequenceBatch:
    return SequenceBatch(ITEMS, TARGETS, torch.arange(2), **fields)


@pytest.mark.parametrize("name", BACKBONES)
def test_scores_are_those_of_the_sums(name: str) -> None:
    model = make(name, features())
    none = torch.zeros(0).long()
    batch = RankingBatch(ITEMS, torch.ones(2).long(), none, none)
    with torch.no_grad():
        assert torch.allclose(model(batch), folded(model)(batch), atol=1e-10)


LOSSES = {
    "cross_entropy": (LossConfig(), {}),
    "bce": (
        LossConfig(name="bce"),
        {"negative_ids": torch.tensor([[[4], [5], [6], [8]], [[9], [10], [0], [0]]])},
    ),
    "gbce": (
        LossConfig(name="gbce"),
        {"negative_ids": torch.tensor([[[4], [5], [6], [8]], [[9], [10], [0], [0]]])},
    ),
    "sampled_softmax": (
        LossConfig(name="sampled_softmax", num_negatives=3),
        {
            "shared_negative_ids": torch.tensor([2, 7, 11]),
            "shared_log_probability": torch.full((3,), -2.0).double(),
        },
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_and_its_gradient_see_the_sums(name: str) -> None:
    loss, fields = LOSSES[name]
    model = make("sasrec", features(), loss)
    plain = with_loss(folded(model), loss)
    outputs = [m(training_batch(**fields)) for m in (model, plain)]
    for output in outputs:
        assert isinstance(output, TrainingOutput)
        output.terms["loss"].sum.backward()
    assert torch.allclose(outputs[0].terms["loss"].sum, outputs[1].terms["loss"].sum, atol=1e-10)
    vectors, embedding = model.backbone.item_embedding, plain.backbone.item_embedding
    assert isinstance(vectors, ItemVectors)
    assert isinstance(embedding, nn.Embedding)
    whole = embedding.weight.grad
    assert whole is not None
    assert vectors.embedding.weight.grad is not None
    assert torch.allclose(vectors.embedding.weight.grad, whole, atol=1e-10)
    expected = torch.einsum("id,ic->dc", whole, features().double())  # through e_i = E_i + A f_i
    assert vectors.adapter.weight.grad is not None
    assert expected.abs().max() > 1e-3
    assert torch.allclose(vectors.adapter.weight.grad, expected, atol=1e-10)


def test_an_item_without_tokens_padding_and_the_mask_keep_their_own_embedding() -> None:
    vectors = make("bert4rec", features()).backbone.item_embedding
    assert isinstance(vectors, ItemVectors)
    mask = NUM_ITEMS + 1
    assert len(vectors.weight) == mask + 1
    for item in (0, WITHOUT, mask):
        assert torch.equal(vectors(torch.tensor([item])), vectors.embedding.weight[[item]])
    assert not torch.allclose(vectors(torch.tensor([1])), vectors.embedding.weight[[1]])
    assert vectors.weight[0].abs().sum() == 0


def test_some_ids_and_all_rows_agree() -> None:
    vectors = make("sasrec", features()).backbone.item_embedding
    ids = torch.tensor([[3, 3, 0], [12, 7, 1]])
    assert torch.allclose(vectors(ids), vectors.weight[ids], atol=1e-12)
    assert vectors(ids[:0]).shape == (0, 3, DIM)


def test_the_mixtures_are_no_state_and_no_parameter() -> None:
    model, bare = make("sasrec", features()), make("sasrec")
    added = set(model.state_dict()) - set(bare.state_dict())
    assert added == {
        "backbone.item_embedding.embedding.weight",
        "backbone.item_embedding.adapter.weight",
    }
