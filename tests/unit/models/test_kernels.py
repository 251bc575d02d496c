"""The CPU kernels against plain torch in float64, and the plain path where there are none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import REPOSITORY, new_model
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.config import BackboneConfig, ExpertConfig, FilterConfig, LossConfig, MLTFRConfig
from mltfr_dist.data.batch import SequenceBatch
from mltfr_dist.models import dropout
from mltfr_dist.models.dropout import scaled_masks
from mltfr_dist.models.experts import ExpertCore, ExpertRows
from mltfr_dist.models.kernels import (
    attend,
    build,
    largest_products,
    map_rows,
    mix,
    nearest,
    row_maxima,
    unit_backward,
    unit_vectors,
    used_rows,
    weigh_kept,
)
from mltfr_dist.models.packing import Packing
from mltfr_dist.models.placed_table import ReplicatedTable
from mltfr_dist.models.query_blocks import QueryBlocks
from mltfr_dist.models.relevance import row_relevance
from mltfr_dist.models.search import nearest_rows, search, search_rows
from mltfr_dist.models.selectors import Queries
from mltfr_dist.models.selectors.user_guided import UserGuided
from mltfr_dist.published.queries import WholeHistory

pytestmark = pytest.mark.skipif(
    build.library() is None, reason="no C++ compiler or no AVX2: there are no kernels to test"
)
few = settings(max_examples=40, deadline=None, derandomize=True)


class Alone:
    """One process."""

    def sum(self, values: Tensor) -> Tensor:
        return values

    def max(self, values: Tensor) -> Tensor:
        return values


def plain_attention(
    query: Tensor, keys: Tensor, values: Tensor, weights: Tensor, kept: Tensor, mask: Tensor | None
) -> Tensor:
    """As the formula says, with copies of the kept rows."""
    groups, positions, heads = *query.shape[:2], HEADS

    def split(t: Tensor) -> Tensor:
        return t.unflatten(-1, (heads, -1)).transpose(1, 2)

    logits = split(query) @ split(keys[kept]).mT / (query.shape[2] // heads) ** 0.5
    shares = torch.softmax(logits + weights[:, None, None], dim=-1)
    shares = shares if mask is None else shares * mask
    return (shares @ split(values[kept])).transpose(1, 2).reshape(groups, positions, -1)


HEADS = 3


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("positions", "dim", "kept"), [(4, 16, 16), (1, 32, 9), (3, 5, 33), (2, 8, 1), (5, 1, 2)]
)
def test_attention_and_its_gradients(positions: int, dim: int, kept: int, masked: bool) -> None:
    torch.manual_seed(0)
    groups, rows = 11, 20
    shapes = [(groups, positions, HEADS * dim), *[(rows, HEADS * dim)] * 2, (groups, kept)]
    given = [torch.randn(*shape).requires_grad_() for shape in shapes]
    which = torch.randint(rows, (groups, kept))  # rows may come twice
    mask = (torch.rand(groups, HEADS, positions, kept) > 0.2) / 0.8 if masked else None
    gradient = torch.randn(shapes[0])

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        result = attend(*given[:3], which, given[3], mask, HEADS)
        return [result, *torch.autograd.grad(result, given, gradient)]

    before = torch.get_num_threads()
    single, several = run(1), run(3)
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(single, several, strict=True))
    exact = [t.detach().double().requires_grad_() for t in given]
    expected = plain_attention(*exact, which, mask)
    expected = [expected, *torch.autograd.grad(expected, exact, gradient.double())]
    for result, wanted in zip(single, expected, strict=True):
        torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("with_kernels", [True, False])
@pytest.mark.parametrize(("dim", "experts"), [(64, 3), (13, 2), (3, 1)])
def test_mixing_and_its_gradients(
    dim: int, experts: int, with_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    if not with_kernels:
        monkeypatch.setattr(build, "library", lambda: None)
    outputs = [torch.randn(7, 4, dim, requires_grad=True) for _ in range(experts)]
    masks = [(torch.rand(7, 4, dim) > 0.2) / 0.8 if e != 1 else None for e in range(experts)]
    gate = torch.rand(7, 4, experts + 1, requires_grad=True)  # a null expert stands last
    gradient = torch.randn(7, 4, dim)
    result = mix(outputs, masks, gate[..., :experts])
    made = [result, *torch.autograd.grad(result, [gate, *outputs], gradient)]
    exact = [t.detach().double().requires_grad_() for t in (gate, *outputs)]
    total = torch.zeros(7, 4, dim).double()
    for e, mask in enumerate(masks):
        total = total + exact[0][..., e : e + 1] * exact[1 + e] * (1 if mask is None else mask)
    wanted = [total, *torch.autograd.grad(total, exact, gradient.double())]
    for one, other in zip(made, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("with_kernels", [True, False])
def test_masks_of_whole_blocks_are_seen_where_positions_stand(
    with_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    if not with_kernels:
        monkeypatch.setattr(build, "library", lambda: None)
    places = torch.tensor([0, 1, 2, 4, 5, 8, 11])
    outputs = [torch.randn(7, 13, requires_grad=True) for _ in range(3)]
    masks = [(torch.rand(3, 4, 13) > 0.2) / 0.8 for _ in range(3)]
    of_those = [mask.flatten(0, 1)[places] for mask in masks]
    gate, gradient = torch.rand(7, 3, requires_grad=True), torch.randn(7, 13)
    made, wanted = mix(outputs, masks, gate, places), mix(outputs, of_those, gate)
    assert torch.equal(made, wanted)
    leaves = [gate, *outputs]
    of_made, of_wanted = (torch.autograd.grad(t, leaves, gradient) for t in (made, wanted))
    assert all(map(torch.equal, of_made, of_wanted))


def test_attention_says_what_is_wrong_and_hides_nothing() -> None:
    query, rows = torch.randn(2, 4, HEADS * 5), torch.randn(7, HEADS * 5)
    kept, weights = torch.randint(7, (2, 3)), torch.randn(2, 3)

    for which in (kept + 7, kept - 7, kept.int()):
        with pytest.raises(IndexError, match="among the 7"):
            attend(query, rows, rows, which, weights, None, HEADS)
    for offset in range(3):  # one broken row is enough, wherever it stands
        broken = rows.clone()
        broken[kept[0, offset]] = torch.nan
        result = attend(query, broken, rows, kept, weights, None, HEADS)
        assert result[0].isnan().all()


@pytest.mark.parametrize("with_kernels", [True, False])
@pytest.mark.parametrize("groups", [0, 5])
def test_every_rank_calls_the_same_modules(
    groups: int, with_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO-3 gathers parameters at each call, from every rank: also from one whose batch is empty,
    or that has no compiler.
    """
    torch.manual_seed(0)
    if not with_kernels:
        monkeypatch.setattr(build, "library", lambda: None)
    core = ExpertCore(ExpertConfig(num_heads=2, head_dim=8), hidden_dim=8, row_dim=8)
    called: list[nn.Module] = []
    for module in core.modules():
        module.register_forward_hook(lambda module, *_: called.append(module))
    rows = torch.randn(6, 8, requires_grad=True)
    kept = torch.zeros(groups, 3, dtype=torch.int64)
    x = torch.randn(groups, 4, 8, requires_grad=True)
    result = core(x, [ExpertRows(rows, kept, torch.zeros(groups, 3))])
    assert result.shape == x.shape
    assert called == [core.query, core.key, core.value, core.out, core]
    result.sum().backward()
    assert all(p.grad is not None for p in core.parameters())


@pytest.mark.parametrize("count", [1, 6, 8, 21])
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("width", [64, 3, 21])
def test_weights_of_kept_rows_and_their_gradients(width: int, noisy: bool, count: int) -> None:
    torch.manual_seed(0)
    units = (F.normalize(torch.randn(n, width), dim=-1) for n in (9, 24))
    query, rows = (unit.requires_grad_() for unit in units)
    temperature = torch.tensor([0.3], requires_grad=True)
    kept = torch.rand(9, 24).argsort(1)[:, :count]
    noise = torch.randn(9, count) if noisy else None
    exact = [t.detach().double().requires_grad_() for t in (query, rows, temperature)]
    scores = (exact[0][:, None] * exact[1][kept]).sum(-1) + (0 if noise is None else noise.double())
    expected = (scores / exact[2]).log_softmax(-1)
    result = weigh_kept(query, rows, kept, temperature, noise)
    gradient = torch.randn(9, count)
    got = [result, *torch.autograd.grad(result, [query, rows, temperature], gradient)]
    wanted = [expected, *torch.autograd.grad(expected, exact, gradient.double())]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)
    with pytest.raises(IndexError):  # torch says so, and no memory is read
        weigh_kept(query, rows, kept + 24, temperature, noise)


def test_a_broken_number_is_seen_in_the_weights_of_its_query_alone() -> None:
    query, rows = torch.randn(3, 8), torch.randn(5, 8)
    query[1, 2] = torch.nan
    result = weigh_kept(query, rows, torch.arange(5).expand(3, -1), torch.ones(1))
    assert result.isnan().all(1).tolist() == [False, True, False]
    assert result[[0, 2]].isfinite().all()


@few
@given(st.lists(st.integers(0, 30), max_size=80), st.integers(31, 60))
def test_rows_that_are_kept_are_numbered_anew(kept: list[int], count: int) -> None:
    given_rows = torch.tensor(kept, dtype=torch.int64).view(-1, 1)
    result = used_rows(given_rows, count)
    assert result is not None
    used, numbers = result
    assert used.tolist() == sorted(set(kept))
    assert torch.equal(used[numbers], given_rows)
    assert used_rows(torch.tensor([[0, count]]), count) is None
    assert used_rows(torch.tensor([[0, -1]]), count) is None


@pytest.mark.parametrize("width", [64, 3, 21])
def test_gradients_through_unit_vectors(width: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn(14, width).double().requires_grad_()
    unit, gradient = F.normalize(rows, dim=-1), torch.randn(14, width)
    (expected,) = torch.autograd.grad(unit, rows, gradient.double())
    leaf = rows.detach().float().requires_grad_()
    by_kernel = unit_vectors(leaf)
    torch.testing.assert_close(by_kernel.double(), unit, rtol=1e-5, atol=1e-6)
    (made,) = torch.autograd.grad(by_kernel, leaf, gradient)
    torch.testing.assert_close(made.double(), expected, rtol=1e-5, atol=1e-6)
    lengths = rows.detach().norm(dim=1)[:, None]
    made = unit_backward(gradient.double(), unit.detach(), lengths)  # by torch
    torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-12)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "spread": lambda v: v,
    "alike": lambda v: v[:1] + 0.01 * v,  # fp32 and 8 bits tell few apart
    "equal": lambda v: v[torch.arange(len(v)) % 3],
    "spiky": lambda v: v**9,  # one number holds nearly all
    "zero": lambda v: v * (torch.arange(len(v)) % 2)[:, None],
}


@few
@given(
    rows=st.integers(1, 5000),
    width=st.sampled_from([1, 2, 9, 64, 65, 200]),
    count=st.integers(1, 40),
    kind=st.sampled_from(sorted(KINDS)),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_the_nearest_are_those_of_float64(
    rows: int, width: int, count: int, kind: str, threads: int, seed: int
) -> None:
    torch.manual_seed(seed)
    query = F.normalize(KINDS[kind](torch.randn(37, width)), dim=1)
    table = F.normalize(KINDS[kind](torch.randn(rows, width)), dim=1)
    count = min(count, rows)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    result, bounds = nearest(query, table, count), largest_products(query, table)
    torch.set_num_threads(before)
    assert result is not None
    assert bounds is not None
    products = query.double() @ table.double().T
    expected = products.float().sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(result[0], expected.values[:, :count], rtol=0, atol=1e-7)
    same = expected.indices[:, :count] == result[1]
    # Sums in another order may round to another fp32 number: only true near-ties may differ.
    chosen = products.gather(1, result[1])
    assert ((chosen - products.gather(1, expected.indices[:, :count])).abs()[~same] < 2e-7).all()
    assert same.float().mean() > 0.99 or kind == "alike"
    largest = products.amax(0)
    assert (bounds[0] <= largest + 1e-7).all()
    assert (largest <= bounds[0] + bounds[1]).all()


@few
@given(
    rows=st.integers(1, 200),
    width=st.sampled_from([1, 9, 64, 300]),
    dim=st.sampled_from([1, 8, 31, 32, 64, 70]),
    queries=st.integers(1, 30),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_rows_are_mapped_and_their_largest_products_are_those_of_float64(
    rows: int, width: int, dim: int, queries: int, threads: int, seed: int
) -> None:
    torch.manual_seed(seed)
    table, linear = torch.randn(rows, width), nn.Linear(width, dim)
    query = F.normalize(torch.randn(queries, dim), dim=1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with torch.no_grad():
        made = map_rows(table, linear.weight, linear.bias)
        expected = linear.double()(table.double())
    assert made is not None
    unit, divided_by = made
    maxima = row_maxima(query, unit)
    torch.set_num_threads(before)
    assert maxima is not None
    torch.testing.assert_close((unit * divided_by).double(), expected, rtol=1e-5, atol=1e-5)
    lengths = unit.double().norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-6)
    along = unit.double() * expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(along, expected, rtol=1e-5, atol=1e-5)
    largest = (query.double() @ unit.double().T).amax(0)
    torch.testing.assert_close(maxima.double(), largest, rtol=0, atol=1e-6)


def test_rows_are_mapped_by_torch_where_gradients_are_wanted() -> None:
    linear = nn.Linear(5, 4)
    assert map_rows(torch.randn(3, 5), linear.weight, linear.bias) is None
    with torch.no_grad():
        zeros = map_rows(torch.zeros(3, 5), linear.weight, torch.zeros(4))
        assert zeros is not None
        assert torch.equal(zeros[0], torch.zeros(3, 4))  # of length zero, as torch's normalize
        assert map_rows(torch.randn(0, 5), linear.weight, linear.bias) is None
    assert row_maxima(torch.randn(0, 4), torch.randn(3, 4)) is None


def test_numbers_that_are_not_finite_are_left_to_torch() -> None:
    query, rows = torch.randn(40, 8), torch.randn(50, 8)
    assert nearest(query, rows, 3) is not None
    rows[7, 2] = torch.nan
    assert nearest(query, rows, 3) is None
    assert largest_products(query, rows) is None
    assert nearest(query.double(), rows.double(), 3) is None


def as_they_are(rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return rows.to(dtype)


@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_both_paths_keep_the_same_rows(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query = F.normalize(torch.randn(1, 24) + torch.randn(300, 24), dim=1)
    rows = torch.randn(1, 24) + spread * torch.randn(3000, 24)
    rows[2000:] = rows[1000:2000]  # equal ones: the lower numbers win
    rows = F.normalize(rows, dim=1)

    def kept() -> list[Tensor]:
        return [search(query, rows, 9), nearest_rows(query, rows, as_they_are, 9)]

    by_kernel = kept()
    monkeypatch.setattr(build, "library", lambda: None)
    plain = kept()
    whole = search_rows(query, rows, as_they_are, 9)[1]
    exact = (F.normalize(query.double(), dim=1) @ rows.double().T).float()
    expected = exact.sort(dim=1, descending=True, stable=True).indices[:, :9]
    assert torch.equal(whole, expected)
    assert all(torch.equal(result, expected) for result in (by_kernel[1], plain[1]))
    assert torch.equal(by_kernel[0], plain[0])


@pytest.mark.parametrize("spread", [1.0, 0.01])
def test_a_shortlist_by_bounds_is_that_of_all_products(spread: float) -> None:
    torch.manual_seed(0)
    selector = UserGuided(FilterConfig(top_k=4, shortlist_size=60), 5000, 12, 16)
    rows = torch.randn(12) + spread * torch.randn(5000, 12)
    rows[3000:4000] = rows[:1000]  # equal ones: the lower numbers are listed
    queries = [torch.randn(80, 16), torch.randn(50, 16)]
    selector.refresh(queries, ReplicatedTable(rows), Alone())
    relevance = row_relevance(torch.cat(queries), rows, selector.project, torch.float64)
    assert selector.shortlist is not None
    expected = relevance.sort(descending=True, stable=True).indices[:60].sort().values
    assert torch.equal(selector.shortlist.row_ids, expected)


@pytest.mark.parametrize("shortlist", [200, None])
def test_a_step_is_the_same_by_both_paths(
    shortlist: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout's draws included."""

    def step() -> list[Tensor]:
        torch.manual_seed(0)
        config = MLTFRConfig(tables=("a", "b"), filter=FilterConfig(shortlist_size=shortlist))
        model = new_model(
            BackboneConfig(hidden_dim=32, num_layers=2, num_heads=2),
            config,
            LossConfig(),
            num_items=50,
            max_len=20,
            table_rows=[torch.randn(900, 12), torch.randn(700, 20)],
        ).train()
        item_ids = torch.randint(1, 50, (16, 20))
        output = model(SequenceBatch(item_ids, item_ids.roll(-1, 1), torch.arange(16)))
        loss = output.terms["loss"].sum / item_ids.numel()
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    by_kernel = step()
    monkeypatch.setattr(build, "library", lambda: None)
    for result, expected in zip(by_kernel, step(), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)


SAYS = """
import warnings
import torch
from mltfr_dist.models.kernels import nearest
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        assert nearest(torch.randn(40, 8), torch.randn(50, 8), 3) is None
print(*[str(w.message) for w in said], sep="\\n")
"""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"CXX": "false"}, "false failed: it says nothing"),
        ({"CXX": "no-such-compiler"}, "no-such-compiler did not run"),
        ({"ATEN_CPU_CAPABILITY": "default"}, "has no AVX2"),
        ({build.SWITCH: "off"}, ""),
    ],
    ids=["compiler fails", "no compiler", "no AVX2", "switched off"],
)
def test_a_machine_without_kernels_says_so_once(
    environment: dict[str, str], expected: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SAYS],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)} | environment,
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert len(done.stdout.strip().splitlines()) == bool(expected)


def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    counted = tmp_path / "compiler"
    counted.write_text(f'#!/bin/sh\necho >> {tmp_path}/calls\nexec c++ "$@"\n')
    counted.chmod(0o755)
    program = "from mltfr_dist.models.kernels import build; assert build.library() is not None"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"XDG_CACHE_HOME": str(tmp_path), "CXX": str(counted), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    said = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    sources = [name for name in build.SOURCES if name.endswith(".cpp")]
    assert len((tmp_path / "calls").read_text().splitlines()) == len(sources) + 1
    assert said[1] == ""
    assert [file.suffix for file in sorted((tmp_path / "mltfr_dist").iterdir())] == [".lock", ".so"]


def test_where_gradients_are_wanted_only_kept_rows_go_on() -> None:
    """The same rows with the same weights as without; no other row is adapted."""
    torch.manual_seed(0)
    table = ReplicatedTable(torch.randn(300, 24))
    selector = UserGuided(FilterConfig(top_k=4, shortlist_size=100), 300, 24, 16)
    query = torch.randn(20, 16, requires_grad=True)
    narrow = selector(Queries(query), table)
    with torch.no_grad():
        whole = selector(Queries(query), table)
    assert narrow.kept is not None
    assert whole.kept is not None
    assert len(whole.candidates) == 100
    assert torch.equal(narrow.row_ids[narrow.kept], whole.row_ids[whole.kept])
    assert torch.equal(narrow.row_ids, narrow.row_ids[narrow.kept].unique())
    assert torch.equal(narrow.candidates, table.rows[narrow.row_ids])
    torch.testing.assert_close(narrow.log_weights, whole.log_weights, rtol=1e-5, atol=1e-5)


@few
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    width=st.sampled_from([1, 5, 64]),
    block_len=st.sampled_from([1, 3, 4, 9, 11]),
    whole=st.booleans(),
    threads=st.integers(1, 3),
)
def test_blocks_and_their_gradients(
    lengths: list[int], width: int, block_len: int, whole: bool, threads: int
) -> None:
    """Against torch's operators in float64, whose path they are."""
    packing = Packing((torch.arange(9) < torch.tensor(lengths)[:, None]).long())
    kind = WholeHistory if whole else QueryBlocks
    x = torch.randn(sum(lengths), width)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    result: list[list[Tensor]] = []
    torch.manual_seed(0)
    weights = torch.randn(9 * len(lengths), 11, width).double()
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        blocks = kind(leaf, packing, block_len)
        shape = blocks.positions.shape
        weight = weights[: shape[0], : shape[1]].to(dtype)
        real = blocks.at_real(blocks.positions * weight)
        total = (real**2).sum() + (blocks.positions * weight).sum()
        total = total + (blocks.queries * weight[:, 0]).sum()
        (gradient,) = torch.autograd.grad(total, leaf)
        result.append([t.double() for t in (blocks.positions, blocks.queries, real, gradient)])
    torch.set_num_threads(before)
    for got, wanted in zip(*result, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_flags_are_those_of_what_torch_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with AVX512 whose use torch was denied gets AVX2 alone."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert build.flags_here() == build.FLAGS
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    has_vnni = "avx512_vnni" in Path("/proc/cpuinfo").read_text()
    assert build.flags_here() == ((*build.FLAGS, *build.VNNI_FLAGS) if has_vnni else build.FLAGS)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 1023, 1024, 1025, 5001])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_masks_are_drawn_alike_by_both_paths(
    count: int, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(count)
    shapes, ps = [(count,), (count // 2 + 3, 2), (5,)], [p, 0.3, p]
    by_kernel = scaled_masks(shapes, ps)
    torch.manual_seed(count)
    monkeypatch.setattr(dropout, "draw_masks", lambda *_: None)
    by_numpy = scaled_masks(shapes, ps)
    assert [tuple(mask.shape) for mask in by_kernel] == shapes
    assert all(torch.equal(a, b) for a, b in zip(by_kernel, by_numpy, strict=True))
