"""Filter strategies: each causal, the same alone and in any batch, repeatable to the bit, and
trained in full.
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
from support import REPOSITORY, new_model, read_lines, run_ranks, tiny_config
from torch import Tensor, nn

from mltfr_dist.config import (
    BackboneConfig,
    ConsensusConfig,
    ExpertConfig,
    FilterConfig,
    LossConfig,
    MLTFRConfig,
)
from mltfr_dist.data.batch import SequenceBatch
from mltfr_dist.distributed.fisher import fisher_diagonals
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.errors import ConfigError
from mltfr_dist.models.draws import history_keys
from mltfr_dist.models.experts import ExpertCore, ExpertRows
from mltfr_dist.models.placed_table import ReplicatedTable
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.models.selectors import Queries
from mltfr_dist.models.selectors.others import Prototypes, RandomTokens
from mltfr_dist.selectors import SELECTORS, Entry
from mltfr_dist.tables.store import load_table
from mltfr_dist.training.build import build_model
from mltfr_dist.training.evaluating.evaluate import evaluate
from mltfr_dist.training.evaluating.rankers import ByModel
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.run_folder import dump_config, load_result
from mltfr_dist.training.streams import ranking_stream
from mltfr_dist.training.using.explain import explain
from mltfr_dist.training.using.inference import load_run

ONE = Ranks(0, 1, torch.device("cpu"))
NUM_ITEMS, MAX_LEN, DIM = 30, 10, 16
SHAPES = ((60, 24), (90, 12))
STRATEGIES = ("random_tokens", "direct", "learned_prototypes")
HISTORIES = [[3, 7, 7, 1, 30, 2, 9], [5, 2], [9], [4, 4, 4, 8, 15, 16, 23, 29, 1, 6]]


def make(strategy: str, *, seed: int = 0, **fields: object) -> Recommender:
    torch.manual_seed(seed)
    config = MLTFRConfig(
        tables=tuple(f"table{m}" for m in range(len(SHAPES))),
        filter=FilterConfig(strategy=strategy, top_k=4, query_every=3, num_prototypes=7, **fields),
        expert=ExpertConfig(num_heads=2, head_dim=4, dropout=0.1),
        consensus=ConsensusConfig(weight=0.7),
    )
    tables = [
        torch.randn(*shape, generator=torch.Generator().manual_seed(m))
        for m, shape in enumerate(SHAPES)
    ]
    backbone = BackboneConfig(hidden_dim=DIM, num_heads=2)
    made = new_model(
        backbone, config, LossConfig(), num_items=NUM_ITEMS, max_len=MAX_LEN, table_rows=tables
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        made.backbone.item_embedding.weight[0] = 0
        made.mltfr.add_consensus(
            {name: 0.4 * torch.randn_like(p) for name, p in made.mltfr.cores[0].named_parameters()}
        )
    return made.eval()


exact = cache(lambda strategy: make(strategy).double())


def padded(histories: list[list[int]], width: int = 0) -> Tensor:
    width = max(width, *map(len, histories))
    return torch.tensor([h + [0] * (width - len(h)) for h in histories])


@torch.no_grad()
def hidden(model: Recommender, histories: list[list[int]], width: int = 0) -> Tensor:
    states, packing, _ = model.hidden(padded(histories, width))
    return packing.unpack(states)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_neither_batch_nor_padding_nor_future_shows(strategy: str) -> None:
    model = exact(strategy)
    together = hidden(model, [*HISTORIES, []], MAX_LEN)
    assert together[-1].abs().sum() == 0
    for row, history in zip(together, HISTORIES):
        for length in range(1, len(history) + 1):
            torch.testing.assert_close(
                hidden(model, [history[:length]])[0], row[:length], rtol=0, atol=1e-12
            )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_evaluations_agree_to_the_bit(strategy: str) -> None:
    model = make(strategy)
    assert torch.equal(hidden(model, HISTORIES), hidden(model, HISTORIES))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_parameter_gets_a_gradient(strategy: str) -> None:
    model = make(strategy)
    batch = SequenceBatch(
        padded([h[:-1] for h in HISTORIES]), padded([h[1:] for h in HISTORIES]), torch.arange(4)
    )
    output = model(batch)
    output.terms["loss"].sum.backward()
    for name, parameter in model.mltfr.named_parameters():
        assert parameter.grad is not None, name
        # A key's bias shifts all logits of a row alike.
        assert name.endswith("key.bias") or parameter.grad.abs().max() > 1e-8, name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_batch_of_padding_costs_nothing_and_gives_finite_gradients(strategy: str) -> None:
    model = make(strategy)
    output = model(
        SequenceBatch(torch.zeros(2, 1).long(), torch.zeros(2, 1).long(), torch.full((2,), -1))
    )
    (output.terms["loss"].sum + output.terms["balance_loss"].sum).backward()
    assert output.terms["loss"].sum.item() == 0
    assert all(
        p.grad is None or torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters()
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_fisher_is_that_of_a_loop_over_samples(strategy: str) -> None:
    model = make(strategy)
    batch = SequenceBatch(
        padded([h[:-1] for h in HISTORIES]), padded([h[1:] for h in HISTORIES]), torch.arange(4)
    )
    batch = SequenceBatch(*(t[[0, 1, 3]] for t in batch[:2]), torch.arange(3))
    result = fisher_diagonals(model, [batch], Ranks(0, 1, torch.device("cpu")), 3)
    for m, core in enumerate(model.mltfr.cores):
        expected = {name: torch.zeros_like(p) for name, p in core.named_parameters()}
        for row in range(3):
            single = SequenceBatch(*(t[row : row + 1] for t in batch[:3]))
            loss = model(single).terms["loss"].sum / (single.target_ids != 0).sum()
            for (name, _), gradient in zip(
                core.named_parameters(),
                torch.autograd.grad(loss, list(core.parameters())),
                strict=True,
            ):
                expected[name] += gradient.square() / 3
        for name, value in expected.items():
            assert (result[m][name] - value).abs().max() <= 1e-4 * max(float(value.max()), 1e-9), (
                name
            )


def test_a_shared_memory_equals_a_copy_for_every_query() -> None:
    torch.manual_seed(0)
    core = ExpertCore(ExpertConfig(num_heads=2, head_dim=4, dropout=0.0), DIM, DIM).double()
    x, rows = torch.randn(5, 3, DIM).double(), [torch.randn(n, DIM).double() for n in (6, 9)]
    weights = [torch.randn(1, len(r)).double() for r in rows]
    shared = core(x, [ExpertRows(r, None, w) for r, w in zip(rows, weights, strict=True)])
    copied = core(
        x,
        [
            ExpertRows(r, torch.arange(len(r)).expand(5, -1), w.expand(5, -1))
            for r, w in zip(rows, weights, strict=True)
        ],
    )
    torch.testing.assert_close(shared, copied, rtol=0, atol=1e-12)


# --- random tokens
# -----------------------------------------------------------------------------------------------


def test_history_keys_are_of_the_prefix_with_its_order() -> None:
    keys = history_keys(padded([[1, 2, 3], [2, 1, 3], [1, 2]]))
    assert keys[0, 1] == keys[2, 1]  # the same past
    assert keys[2, 2] == keys[2, 1]  # padding adds nothing
    assert keys[0, 1] != keys[1, 1]
    assert len(keys[:2].flatten().unique()) == 6


def test_random_tokens_are_uniform_over_the_whole_table_and_follow_from_the_seed() -> None:
    torch.manual_seed(0)
    one = RandomTokens(FilterConfig(top_k=8), 50, 3, DIM)
    keys = history_keys(torch.randint(1, 1000, (4000, 5)))[:, -1]
    table = torch.randn(50, 3)
    chosen = one(Queries(torch.zeros(4000, DIM), keys), ReplicatedTable(table))
    ids = chosen.row_ids[chosen.kept]
    assert ids.shape == (4000, 8)
    counts = torch.bincount(ids.flatten(), minlength=50).double()
    chi_square = ((counts - 640) ** 2 / 640).sum()
    assert chi_square < 85.4  # 99.9% of chi-square with 49 degrees of freedom
    assert torch.equal(chosen.candidates, table[chosen.row_ids])
    torch.testing.assert_close(chosen.log_weights.exp().sum(1), torch.ones(4000))
    torch.manual_seed(1)
    other = RandomTokens(FilterConfig(top_k=8), 50, 3, DIM)
    assert not torch.equal(other.salt, one.salt)
    assert (
        make("random_tokens").mltfr.selectors[0].salt
        != make("random_tokens").mltfr.selectors[1].salt
    )
    assert (
        make("random_tokens").mltfr.selectors[0].salt
        == make("random_tokens").mltfr.selectors[0].salt
    )
    assert "mltfr.selectors.0.salt" in make("random_tokens").state_dict()


def test_random_tokens_do_not_depend_on_what_is_learned() -> None:
    before, after = make("random_tokens"), make("random_tokens")
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.mul_(1.7)
    ids = padded(HISTORIES)
    for one, other in zip(before.explain(ids), after.explain(ids), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.kept_ids, other.kept_ids, strict=True))
    assert len({tuple(e.kept_ids[0].tolist()) for e in before.explain(ids)}) > 1


# --- prototypes
# ------------------------------------------------------------------------------------------------


def test_prototypes_by_hand() -> None:
    torch.manual_seed(0)
    config = FilterConfig(strategy="learned_prototypes", num_prototypes=3)
    one, table = Prototypes(config, 20, 5, DIM), torch.randn(20, 5)
    made = one(Queries(torch.zeros(1, DIM)), ReplicatedTable(table))
    for column in range(5):
        inner = nn.functional.gelu(one.inner.weight @ table[:, column] + one.inner.bias)
        torch.testing.assert_close(
            made.candidates[:, column], one.outer.weight @ inner + one.outer.bias
        )
    assert made.kept is None
    assert made.log_weights.exp().sum().item() == pytest.approx(1)


# --- seed words, limits and whole runs
# ---------------------------------------------------------------------------


def test_seed_words_keep_their_rows_and_the_nearest(tmp_path: Path) -> None:
    tiny_config(tmp_path)
    fields = {
        "strategy": "seed_words",
        "seed_words": ["FIRST-3", "second-5", "first-8"],
        "seed_neighbours": 2,
    }
    config = tiny_config(tmp_path, mltfr__filter=fields)
    inputs = load_inputs(config)
    stored = load_table(tmp_path / "tables" / "first").rows
    unit = stored / stored.norm(dim=1, keepdim=True)
    expected = set()
    for row in (3, 8):
        expected |= set((unit @ unit[row]).argsort(descending=True)[:3].tolist())
    assert set(inputs.tables[0].row_ids) == expected
    assert len(inputs.tables[1].rows) == 3
    assert torch.equal(inputs.tables[0].rows, stored[sorted(expected)])
    model = build_model(config, inputs, with_consensus=False).eval()
    (views,) = explain(model, inputs.tables, torch.tensor([[1, 2, 3]]))
    assert {" first-3", " first-8"} <= {token for token, _ in views[0].tokens}
    assert sum(weight for _, weight in views[0].tokens) == pytest.approx(1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["first-3", "qwzx", "second-1"], "No vocabulary holds the seed word 'qwzx'"),
        (["first-3"], "`second` holds none"),
    ],
)
def test_seed_words_that_are_not_there(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_inputs(
            tiny_config(tmp_path, mltfr__filter={"strategy": "seed_words", "seed_words": words})
        )


@pytest.mark.parametrize("fields", [{"strategy": "seed_words"}, {"seed_words": ["a"]}])
def test_seed_words_and_their_strategy_go_together(
    tmp_path: Path, fields: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match="give both words and strategy"):
        tiny_config(tmp_path, mltfr__filter=fields)


def test_attending_to_too_many_rows_is_refused(tmp_path: Path) -> None:
    fields = {"strategy": "direct", "max_direct_rows": 80}
    with pytest.raises(ConfigError, match=r"90 rows of table `first`.*max_direct_rows \(80\)"):
        load_inputs(tiny_config(tmp_path, mltfr__filter=fields))
    load_inputs(tiny_config(tmp_path, mltfr__filter=fields | {"max_direct_rows": 90}))


def test_an_unknown_strategy_names_the_valid_ones(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match="strategies are user_guided, random_tokens, direct, learned_prototypes, seed_words; "
        "the nearest is `random_tokens`",
    ):
        tiny_config(tmp_path, mltfr__filter={"strategy": "random"})


@pytest.mark.integration
@pytest.mark.parametrize("strategy", ["random_tokens", "learned_prototypes"])
def test_a_whole_run_on_two_ranks_and_the_same_numbers_when_repeated(
    tmp_path: Path, strategy: str
) -> None:
    config = tiny_config(
        tmp_path,
        mltfr__filter={"strategy": strategy, "num_prototypes": 5, "query_every": 2},
        training__epochs=1,
        training__consensus_epochs=1,
    )
    (tmp_path / "c.yaml").write_text(dump_config(config))
    run_ranks(2, REPOSITORY / "train.py", "--config", str(tmp_path / "c.yaml"))
    run = load_run(config.folder)
    metrics = evaluate(
        ByModel(run.model), ranking_stream(config, "test", ONE), config.evaluation, ONE
    )
    assert metrics == pytest.approx(load_result(config.folder).test)
    lines = [line for line in read_lines(config.folder / "metrics.jsonl") if "gate/entropy" in line]
    assert lines
    assert not [key for line in lines for key in line if "temperature" in key or "shortlist" in key]


# --- adding one ----------------------------------------------------------------------------------


def test_the_example_of_contributing_is_a_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    """One class and one registry line, word for word as CONTRIBUTING.md shows them."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text()
    section = text.partition("## A new filter strategy")[2]
    source = textwrap.dedent(section.partition("```python\n")[2].partition("```")[0])
    line = re.search(r'`"longest_rows": (Entry\(.*?\)),`', section)
    assert line
    monkeypatch.setitem(SELECTORS, "longest_rows", eval(line.group(1), {"Entry": Entry}))
    module = types.ModuleType("mltfr_dist.models.selectors.mine")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(source, module.__dict__)
    model = make("longest_rows")
    table = torch.randn(60, 24, generator=torch.Generator().manual_seed(0))
    longest = table[table.norm(dim=1).topk(4).indices]
    chosen = model.mltfr.selectors[0](Queries(torch.zeros(1, DIM)), model.mltfr.table(0))
    assert torch.equal(chosen.candidates, longest)
    before, after = hidden(model, [[1, 2, 3, 4]])[0], hidden(model, [[1, 2, 9, 4]])[0]
    torch.testing.assert_close(after[:2], before[:2], rtol=0, atol=2e-6)
    assert (after[2:] - before[2:]).abs().amax(1).min() > 1e-6
