"""The reference itself: numbers worked out by hand, second formulations, and the published defects
it must show.
"""

from __future__ import annotations

import itertools
import math

import published
import pytest
import torch
from torch import Tensor
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    linear,
    scaled_dot_product_attention,
)

LN3 = math.log(3)
HEADS, HEAD_DIM, DIM, TABLE_DIM = 2, 3, 4, 5


def t(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(result: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expert_params(seed: int) -> dict[str, Tensor]:
    inner = HEADS * HEAD_DIM
    shapes = {
        "query": (inner, DIM),
        "key": (inner, TABLE_DIM),
        "value": (inner, TABLE_DIM),
        "out": (DIM, inner),
    }
    params = {}
    for i, (name, shape) in enumerate(shapes.items()):
        params[f"{name}.weight"] = drawn(seed + 2 * i, *shape)
        params[f"{name}.bias"] = drawn(seed + 2 * i + 1, shape[0])
    return params


# --- user vectors, noise
# -----------------------------------------------------------------------------------------


def test_user_vectors_pool_all_real_positions_and_no_padding() -> None:
    x = t([[1, 2], [3, 8], [100, 100]], [[5, 6], [7, 8], [9, 1]])
    valid = torch.tensor([[True, True, False], [True, True, True]])
    close(published.user_vectors(x, valid), t([2, 5], [7, 5]))


def test_gumbel_at_known_points_and_on_average() -> None:
    result = published.gumbel(t(0, 0.5, math.exp(-1)))
    close(result, t(-math.log(math.log(1e10)), -math.log(math.log(2)), 0), 1e-9)
    middles = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    assert published.gumbel(middles).mean().item() == pytest.approx(
        0.5772157, abs=1e-4
    )  # Euler's constant
    assert published.gumbel(t(1 - 2.0**-53)).isfinite().all()


# --- filter
# ------------------------------------------------------------


def test_kept_by_cosine_and_noise_in_the_projected_space() -> None:
    # The map swaps the columns and the bias shifts the second: rows become (1, 0), (0, 5), (-1, 0);
    # cosines to u 1, 0, -1.
    table, weight, bias, u = t([-1, 1], [4, 0], [-1, -1]), t([0, 1], [1, 0]), t(0, 1), t([7, 0])
    ids, weights = published.kept(u, table, weight, bias, t([0, 0, 0]), 0.5, 2)
    assert ids.tolist() == [[0, 1]]
    close(weights, t([1, 1]) / (2 + 1e-8))
    assert published.kept(u, table, weight, bias, t([0, 1.5, 0]), 0.5, 2)[0].tolist() == [[1, 0]]
    assert published.kept(u, table, weight, bias, t([0, 0, 1.5]), 0.5, 2)[0].tolist() == [[0, 2]]


def filter_gradients(k: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Gradients of u, map and bias for given gradients of the weights: by autograd, and by the
    chain rule written out.
    """
    users, size, tau = 3, 7, 0.5
    u, table, weight, bias = (
        drawn(i, *s)
        for i, s in enumerate([(users, DIM), (size, TABLE_DIM), (DIM, TABLE_DIM), (DIM,)])
    )
    noise, upstream = drawn(4, users, size), drawn(5, users, k)
    leaves = tuple(leaf.requires_grad_() for leaf in (u, weight, bias))
    ids, weights = published.kept(u, table, weight, bias, noise, tau, k)
    result = torch.autograd.grad((weights * upstream).sum(), leaves)
    with torch.no_grad():
        projected = table @ weight.T + bias
        lengths, user_lengths = projected.norm(dim=1), u.norm(dim=1, keepdim=True)
        cosine = (projected / lengths[:, None]) @ (u / user_lengths).T  # [V, B]
        y = torch.softmax((cosine.T + noise) / tau, dim=1)
        # Each kept weight's value is one, so d w_i / d y_j = [i = j] / (K + e) - 1 / (K + e)^2, put
        # together for K = 1.
        total, rest = k + 1e-8, upstream.sum(1, keepdim=True) - upstream
        at_y = torch.zeros_like(y).scatter(1, ids, (upstream * (k - 1 + 1e-8) - rest) / total**2)
        at_cosine = y * (at_y - (y * at_y).sum(1, keepdim=True)) / tau
        at_u, at_projected = torch.zeros_like(u), torch.zeros_like(projected)
        for b, v in itertools.product(range(users), range(size)):
            s, a, c = cosine[v, b], u[b] / user_lengths[b], projected[v] / lengths[v]
            at_u[b] += at_cosine[b, v] * (c - s * a) / user_lengths[b]
            at_projected[v] += at_cosine[b, v] * (a - s * c) / lengths[v]
        return result, (at_u, at_projected.T @ table, at_projected.sum(0))


@pytest.mark.parametrize("k", [2, 4])
def test_gradient_of_kept_is_the_chain_rule_written_out(k: int) -> None:
    for result, expected in zip(*filter_gradients(k), strict=True):
        close(result, expected)
        assert result.norm() > 1e-2


def test_one_kept_token_leaves_the_filter_a_gradient_of_order_1e_minus_8() -> None:
    for result, expected in zip(*filter_gradients(1), strict=True):
        close(result, expected, 1e-15)
        assert 1e-10 < result.norm() < 1e-7


def test_in_float32_one_kept_token_leaves_no_gradient_at_all() -> None:
    u, table, weight, bias, noise = (
        drawn(i, *s).float() for i, s in enumerate([(3, 4), (7, 5), (4, 5), (4,), (3, 7)])
    )
    weight.requires_grad_()
    _, weights = published.kept(u, table, weight, bias, noise, 0.5, 1)
    gradient = torch.autograd.grad((weights * drawn(5, 3, 1).float()).sum(), weight)[0]
    assert gradient.abs().max() == 0


# --- memory and experts
# ------------------------------------------------------------------------------------------


def test_memory_holds_one_users_rows_after_anothers() -> None:
    table = t([1, 2], [3, 4], [5, 6])
    result = published.memory(table, torch.tensor([[2, 0], [0, 1]]), t([0.5, 1], [2, 3]))
    close(result, t([2.5, 3], [1, 2], [2, 4], [9, 12]))


def test_expert_by_hand() -> None:
    # One head of size 4; q = (2 ln 3, 0, 0, 0), first key 1, second 0: logits ln 3 and 0, so 3/4
    # and 1/4 of the values 4 and 8.
    params = {
        "query.weight": t([1], [0], [0], [0]),
        "query.bias": t(LN3, 0, 0, 0),
        "key.weight": t([1, 0], [0, 0], [0, 0], [0, 0]),
        "key.bias": t(0, 0, 0, 0),
        "value.weight": t([0, 1], [0, 0], [0, 0], [0, 0]),
        "value.bias": t(1, 0, 0, 0),
        "out.weight": t([10, 0, 0, 0]),
        "out.bias": t(0.5),
    }
    result = published.expert(t([[LN3]]), t([1, 3], [0, 7]), params, 1, 4)
    close(result, t([[10 * (0.75 * 4 + 0.25 * 8) + 0.5]]))


def test_expert_equals_all_heads_at_once() -> None:
    x, memory, params = drawn(0, 2, 3, DIM), drawn(1, 6, TABLE_DIM), expert_params(2)

    def split(of: Tensor, name: str) -> Tensor:
        mapped = linear(of, params[f"{name}.weight"], params[f"{name}.bias"])
        return mapped.reshape(*of.shape[:-1], HEADS, HEAD_DIM)

    key, value = (
        split(memory, name).transpose(0, 1).expand(2, -1, -1, -1) for name in ("key", "value")
    )
    attended = (
        scaled_dot_product_attention(split(x, "query").transpose(1, 2), key, value)
        .transpose(1, 2)
        .flatten(2)
    )
    expected = linear(attended, params["out.weight"], params["out.bias"])
    close(published.expert(x, memory, params, HEADS, HEAD_DIM), expected)


def through_the_batch(x: Tensor, weight: Tensor, k: int) -> Tensor:
    """A filter and its expert, every position real: [B, L, D] -> [B, L, D]."""
    table, noise = drawn(20, 9, TABLE_DIM), drawn(21, 4, 9)[: len(x)]
    u = published.user_vectors(x, torch.ones(x.shape[:2], dtype=torch.bool))
    ids, weights = published.kept(u, table, weight, drawn(22, DIM), noise, 0.5, k)
    return published.expert(
        x, published.memory(table, ids, weights), expert_params(30), HEADS, HEAD_DIM
    )


def test_a_users_output_depends_on_the_rest_of_the_batch_and_on_later_items() -> None:
    x, weight = drawn(0, 3, 5, DIM), drawn(1, DIM, TABLE_DIM)
    output = through_the_batch(x, weight, 2)
    assert (through_the_batch(x[:1], weight, 2)[0] - output[0]).abs().max() > 1e-3
    changed = x.clone()
    changed[1] = -x[1]
    assert (through_the_batch(changed, weight, 2)[0] - output[0]).abs().max() > 1e-3
    later = x.clone()
    later[0, -1] = -8 * x[0, -1]
    assert (through_the_batch(later, weight, 2)[0, :-1] - output[0, :-1]).abs().max() > 1e-3


def test_the_expert_trains_the_filter_from_two_kept_tokens_on() -> None:
    x, norms = drawn(0, 3, 5, DIM), {}
    for k in (1, 2):
        weight = drawn(1, DIM, TABLE_DIM).requires_grad_()
        loss = (through_the_batch(x, weight, k) * drawn(2, 3, 5, DIM)).sum()
        norms[k] = torch.autograd.grad(loss, weight)[0].norm().item()
    assert norms[1] < 1e-6
    assert norms[2] > 1e-2


# --- gate, output
# ------------------------------------------------------------------------------------------------


def test_gate_once_and_twice() -> None:
    x, weight, bias = t([[2]]), t([LN3], [0]), t(-LN3, 0)
    close(published.gate(x, weight, bias), t([[0.75, 0.25]]))
    twice = 1 / (1 + math.exp(-0.5))
    close(published.gate(x, weight, bias, times=2), t([[twice, 1 - twice]]))


def test_a_second_softmax_confines_six_experts() -> None:
    sure = published.gate(
        t([[1]]), t([60], [0], [0], [0], [0], [0]), torch.zeros(6, dtype=torch.float64), times=2
    )
    close(sure.amax(), torch.tensor(math.e / (math.e + 5), dtype=torch.float64))  # 0.352
    close(sure.amin(), torch.tensor(1 / (math.e + 5), dtype=torch.float64))  # 0.130


def test_output_weighs_experts_by_position_and_adds_the_consensus() -> None:
    pi, experts = t([[0.75, 0.25], [0, 1]]), [t([[4, 8], [1, 1]]), t([[0, 4], [2, 3]])]
    close(published.output(pi, experts, None, 0.1), t([[3, 7], [2, 3]]))
    close(published.output(pi, experts, t([[10, 20], [0, -10]]), 0.1), t([[4, 9], [2, 2]]))


# --- consensus
# ------------------------------------------------------------------------------------------------


def test_consensus_memory_is_the_plain_mean() -> None:
    close(
        published.consensus_memory([t([1, 2], [3, 4]), t([3, 6], [5, 0]), t([2, 1], [1, 2])]),
        t([2, 3], [3, 2]),
    )


def test_fisher_of_two_batches_by_hand() -> None:
    a, b, c = (leaf.requires_grad_() for leaf in (t(1, 2), t(3), t(5)))
    losses = [(a * t(1, 4)).sum() + b[0] * c[0], (a * t(3, 0)).sum() - b[0] * c[0]]
    first, second = published.batch_mean_fisher(iter(losses), [{"w": a, "b": b}, {"w": c}])
    close(first["w"], t(5, 8))
    close(first["b"], t(25))
    close(second["w"], t(9))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_fisher_of_the_batch_mean_shrinks_with_the_batch(size: int) -> None:
    # Samples of gradient +1 and -1: the squared mean of n of them, over all 2^n batches, is 1/n;
    # the true Fisher is 1.
    theta = t(0.3).requires_grad_()
    batches = itertools.product([-1.0, 1.0], repeat=size)
    (result,) = published.batch_mean_fisher(
        ((theta * t(*signs)).mean() for signs in batches), [{"theta": theta}]
    )
    close(result["theta"], t(1 / size))


def test_merge_by_hand_and_where_the_fisher_vanishes() -> None:
    thetas = [{"w": t(2, 4, 4), "b": t(0)}, {"w": t(6, 4, 4), "b": t(1)}]
    fishers = [{"w": t(1, 0, 5e-13), "b": t(9)}, {"w": t(3, 0, 5e-13), "b": t(1)}]
    merged = published.merge(thetas, fishers)
    close(merged["w"], t(5, 0, 2), 1e-11)
    close(merged["b"], t(0.1))


# --- loss
# ------------------------------------------------------------


def test_bce_by_hand() -> None:
    hidden, positive, negative = t([1, 0], [LN3, 1]), t([0, 5], [1, 0]), t([0, -5], [2, -LN3])
    # Logits 0 and 0, then ln 3 and ln 3.
    expected = (2 * math.log(2) - math.log(3 / 4) - math.log(1 / 4)) / 2
    close(published.bce(hidden, positive, negative), torch.tensor(expected, dtype=torch.float64))


def test_bce_equals_torchs_also_at_large_logits() -> None:
    hidden, positive, negative = drawn(0, 6, DIM), drawn(1, 6, DIM), drawn(2, 6, DIM)
    hidden[0] *= 1000
    for_positive, for_negative = (hidden * positive).sum(1), (hidden * negative).sum(1)
    expected = binary_cross_entropy_with_logits(for_positive, torch.ones_like(for_positive))
    expected = expected + binary_cross_entropy_with_logits(
        for_negative, torch.zeros_like(for_negative)
    )
    result = published.bce(hidden, positive, negative)
    close(result, expected)
    assert result.isfinite()
