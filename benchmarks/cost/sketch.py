"""What a refresh's sketch of one layer's gradient costs per training step beside the dense gradient, over sizes.

    python -m benchmarks.cost.sketch

The sketch is measured as it runs in training: the layer's adapters with the probe less those without it, mean of the
two halves of an interval (GΩ, GᵀQ; k = 2r). Dense is G += gᵀx, in a matrix of the weight's size. On a CPU it is
processor time of one thread (:mod:`benchmarks.cost.clock`). Writes benchmarks/results/sketch.json.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from scalora.layers.gradient_sketch import GradientSketch, gather_sketch
from scalora.layers.products import Adapter, add_adapters

from .. import record
from .clock import described, now, one_thread

TOKENS = 1024
RANKS = (2, 4, 8, 16)
# The digits network's, MiniLM's, SmolLM2's.
SIZES = ((64, 128), (128, 128), (192, 192), (384, 384), (1536, 384), (192, 576), (576, 576), (1536, 576))


def measure(m: int, n: int, r: int, dtype: torch.dtype, rounds: int, device: str) -> dict[str, Any]:
    """Milliseconds a step of the sketch and of the dense gradient: medians, in changing order."""
    generator = torch.Generator().manual_seed(0)

    def random_matrix(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, kind)

    def thin(*shape: int) -> Tensor:
        return random_matrix(*shape, kind=torch.float32)

    x, g, result = random_matrix(TOKENS, n).requires_grad_(), random_matrix(TOKENS, m), random_matrix(TOKENS, m)
    own = Adapter(thin(r, n).requires_grad_(), thin(m, r).requires_grad_())
    left = GradientSketch("left", thin(n, 2 * r), torch.zeros(m, 2 * r, device=device, requires_grad=True))
    right = GradientSketch("right", thin(m, 2 * r), torch.zeros(2 * r, n, device=device, requires_grad=True))
    G = torch.zeros(m, n, device=device)

    def adapted(sketch: GradientSketch | None = None) -> Callable[[], object]:
        def step() -> None:
            out = add_adapters(result, x, [own])
            (out if sketch is None else gather_sketch(out, x, sketch)).backward(g)

        return step

    def dense() -> None:
        G.add_(g.mT @ x.detach())

    ways = {"alone": adapted(), "left": adapted(left), "right": adapted(right), "dense": dense}
    times: dict[str, list[float]] = {name: [] for name in ways}
    order, chance = list(ways), random.Random(0)
    for _ in range(rounds):
        chance.shuffle(order)
        for name in order:
            started = now()
            ways[name]()
            times[name].append(1000 * (now() - started))
    medians = {name: median(each) for name, each in times.items()}
    sketch = (medians["left"] + medians["right"]) / 2 - medians["alone"]
    return {
        "m": m, "n": n, "rank": r, "dtype": str(dtype).removeprefix("torch."),
        "sketch_ms": sketch, "dense_ms": medians["dense"], "medians_ms": medians,
        "sketch_numbers": 2 * r * (m + n), "dense_numbers": m * n,
    }  # fmt: skip


def main() -> None:
    parser = record.parser(__doc__, "sketch.json")
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"  # pyright: ignore
    one_thread()
    rows = [
        measure(m, n, r, dtype, options.rounds, device)
        for dtype in (torch.float32, torch.bfloat16)
        for m, n in SIZES
        for r in RANKS
        if 2 * r <= min(m, n)
    ]
    table = Table("dtype", "m × n", "r", "sketch, ms", "dense G, ms", "sketch / dense", "by counting")
    for row in rows:
        table.add_row(
            row["dtype"], f"{row['m']} × {row['n']}", str(row["rank"]), f"{row['sketch_ms']:.3f}",
            f"{row['dense_ms']:.3f}", f"{row['sketch_ms'] / row['dense_ms']:.2f}",
            f"{row['sketch_numbers'] / row['dense_numbers']:.2f}",
        )  # fmt: skip
    Console().print(table)
    record.write(options.output, {"clock": described(), "tokens": TOKENS, "rows": rows})


if __name__ == "__main__":
    main()
