"""What an item table costs that is divided by rows: memory of a rank, bytes that a step brings it,
and their time.

The formulas of docs/distributed.md. `item_tables.py rows` compares their bytes with those that are
exchanged.

    python benchmarks/division_costs.py --items 1000000000 --dim 128 --ranks 64 512
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

PLACE, SCALAR = 8, 4
"""Bytes of a row's number, and of a number in fp32."""


@dataclass(frozen=True)
class Case:
    """A table, what a step reads of it, and over how many ranks it is divided."""

    items: int
    dim: int
    ranks: int
    rows: int
    """Distinct rows that a rank's micro-batch reads, U."""
    positions: int
    """Scored positions of a rank, n."""
    sent: int = SCALAR
    """Bytes of a number in the forward pass: 4 in fp32, 2 in bf16."""

    @property
    def share(self) -> float:
        """Of what is dealt to all ranks, the part that comes from others."""
        return (self.ranks - 1) / self.ranks

    def memory(self, tensors: int = 3) -> float:
        """Bytes of a rank: rows and two moments; 4 tensors where a gradient of all rows is held."""
        return tensors * SCALAR * self.items * self.dim / self.ranks

    def received(self, *, all_items: bool = False) -> dict[str, float]:
        """Bytes that a step of one micro-batch brings a rank, by what they are."""
        dealt = self.rows * self.share
        result = {
            "rows that are asked for": dealt * PLACE,
            "their vectors": dealt * self.dim * self.sent,
            "gradients of rows": dealt * (PLACE + self.dim * SCALAR),
        }
        if all_items:
            others = self.positions * (self.ranks - 1)
            result |= {
                "hidden states, targets, weights": others * (self.dim * self.sent + PLACE + SCALAR),
                "maxima, sums, targets' logits": others * 2 * 3 * SCALAR,
                "gradients of hidden states": others * self.dim * self.sent,
            }
        return result


@dataclass(frozen=True)
class Machine:
    """Assumed, not measured."""

    node: int = 8
    """GPUs of a node."""
    nvlink: float = 450e9
    """Bytes a second that a GPU receives within its node."""
    network: float = 50e9
    """Bytes a second that a GPU receives from other nodes: 400 Gbit/s each."""
    message: float = 2e-6
    """Seconds that one message of an all-to-all takes at least."""
    exchanges: int = 6
    """All-to-alls of a step: counts, rows' numbers, vectors; counts, numbers, gradients."""

    def seconds(self, received: float, ranks: int) -> tuple[float, float]:
        """Of bytes that come from ``ranks`` GPUs in equal parts, and of that the messages alone."""
        inside = min(self.node, ranks) - 1
        outside = ranks - 1 - inside
        block = received / max(1, ranks - 1)
        moved = max(block * inside / self.nvlink, block * outside / self.network)
        return moved, self.exchanges * (ranks - 1) * self.message


def copies_seconds(case: Case, group: int, machine: Machine) -> tuple[float, float, float]:
    """Two-dimensional division: rows over ``group`` ranks, a copy in each group, kept equal at
    every step.

    Returns:
        Memory of a rank in bytes; what it receives in a step; seconds of a step's exchanges.
    """
    inner = Case(case.items, case.dim, group, case.rows, case.positions, case.sent)
    own = sum(inner.received().values())
    copies = case.ranks // group
    between = (
        case.rows * (copies - 1) * (PLACE + case.dim * SCALAR)
    )  # of as many rows, untouched by others at worst
    moved, messages = machine.seconds(own, group)
    return (
        inner.memory(),
        own + between,
        moved + messages + between / machine.network + copies * machine.message,
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=10**9)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--sequences", type=int, default=256, help="of a rank")
    parser.add_argument("--length", type=int, default=50)
    parser.add_argument("--negatives", type=int, default=8192, help="shared ones")
    parser.add_argument("--sent", type=int, default=2, help="bytes of a number: 4 fp32, 2 bf16")
    parser.add_argument("--groups", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    options = parser.parse_args()
    rows = options.sequences * (options.length + 1) + options.negatives
    machine = Machine()
    print(
        "| ranks | sparse, GB a rank | dense, GB a rank | received a step, MB | moved, ms | "
        "messages, ms |"
    )
    print("|---|---|---|---|---|---|")
    cases = [
        Case(options.items, options.dim, n, rows, options.sequences * options.length, options.sent)
        for n in options.ranks
    ]
    for case in cases:
        received = sum(case.received().values())
        moved, messages = machine.seconds(received, case.ranks)
        print(
            f"| {case.ranks} | {case.memory() / 1e9:.1f} | {case.memory(4) / 1e9:.1f} | "
            f"{received / 1e6:.1f} "
            f"| {moved * 1e3:.2f} | {messages * 1e3:.2f} |"
        )
    print("\n| ranks | received a step | MB |\n|---|---|---|")
    for case in cases:
        for name, size in case.received(all_items=True).items():
            print(f"| {case.ranks} | {name} | {size / 1e6:.1f} |")
    print(
        "\n| ranks | rows over | copies | GB a rank | received a step, MB | ms "
        "|\n|---|---|---|---|---|---|"
    )
    for case in cases:
        for group in [g for g in options.groups if g < case.ranks] + [case.ranks]:
            memory, received, seconds = copies_seconds(case, group, machine)
            print(
                f"| {case.ranks} | {group} | {case.ranks // group} | {memory / 1e9:.1f} | "
                f"{received / 1e6:.1f} "
                f"| {seconds * 1e3:.2f} |"
            )


if __name__ == "__main__":
    main()
