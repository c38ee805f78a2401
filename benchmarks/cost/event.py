"""The event alone: beside AdamW's step, beside Algorithm 1 layer by layer, beside its floor, and over size.

    python -m benchmarks.cost.event

SmolLM2's adapters (every linear layer) and, over size, linear layers made on the spot. An event's seconds are a mean
over events enough that recompressions take their share; what stands beside it takes turns with it. The floor: bytes
that an event must move over the machine's measured copy bandwidth, plus its operations over the measured matrix rate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn

import scalora
from scalora.algebra.reference import rescale_layer
from scalora.engine.stores import AdapterStore
from scalora.engine.stores.adapter import SLOTS
from scalora.layers.peft_lora import AdapterLayer, find_layers
from scalora.models.load import load_model

from .. import record
from .clock import described, now, one_thread

STORES = ("adapter", "base")
SIZES = (256, 512, 1024, 2048, 4096, 8192)
RANKS = (4, 8, 16, 32, 64)
COUNTS = (30, 75, 150, 300)
MIDDLE = (10, 1024, 8)  # layers, m = n, r: one of them changes at a time
NARROW = 256  # m = n where the number of layers changes
LARGE = 2048  # m = n from which on the time is fitted once more


class Stack(nn.Module):
    """Equal linear layers; a forward pass is of no interest here."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(count))


class Ground:
    """Adapters with gradients and an Adam that has taken a step, and ScaLoRA attached to them, its store in use."""

    def __init__(self, model: nn.Module, rank: int, store: str) -> None:
        torch.manual_seed(0)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False)
        self.model = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
        self.params = [p for layer in find_layers(self.model) for p in (layer.A, layer.Bt)]
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-4)
        self._gradients()
        self.optimizer.step()
        self.handle = scalora.attach(self.model, self.optimizer, scalora.ScaLoraConfig(interval=1, accumulate=store))  # pyright: ignore[reportArgumentType]
        self.handle.detach()  # events are taken by hand
        columns = self.handle.layers[0].accumulated.room // rank if store == "adapter" else 2
        for _ in range(columns):
            self.event()

    def event(self) -> None:
        self.handle.rescale()

    def adam(self) -> None:
        self.optimizer.step()

    def loop(self) -> None:
        for layer, c in zip(self.handle.layers, self.handle.constants.tolist(), strict=True):
            rescale_layer(layer.base_weight, layer.A, layer.Bt, self.optimizer, layer.scale, c)

    def _gradients(self) -> None:
        for p in self.params:
            p.grad = torch.randn_like(p) * 1e-3


def seconds_of(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, in turns; a round of an event is a mean over a whole cycle of its store."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, rounds):
        for name, call in calls.items():
            started = now()
            for _ in range(SLOTS):
                call()
            if turn >= 0:
                times[name].append((now() - started) / SLOTS)
    return times


def best(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of seven calls."""
    times = []
    for _ in range(7):
        started = now()
        call()
        times.append(now() - started)
    return min(times)


def machine(numbers: int = 2**25, size: int = 2048) -> dict[str, float]:
    """Bytes a second of a copy (read and written, both counted) and float32 operations a second of a product."""
    x, y = torch.randn(numbers), torch.empty(numbers)
    a = torch.randn(size, size)
    return {"bytes": 2 * x.nbytes / best(lambda: y.copy_(x)), "flops": 2 * size**3 / best(lambda: a @ a)}


def floor(layers: list[AdapterLayer], store: str, rates: dict[str, float]) -> dict[str, float]:
    """Bytes, operations and their seconds for one event that moves its difference; a share of a recompression apart."""
    moved = flops = room = 0.0
    for layer in layers:
        (m, r), n = layer.A.shape, layer.Bt.shape[1]
        adapters = 4.0 * (m + n) * r
        moved += adapters * (2 + 4 * 2 + 2)  # read with gradients; four tensors read and written; the store's slot
        flops += 2.0 * (2 * m + 2 * n + m) * r * r
        if store == "base":
            moved += 2 * 4.0 * m * n
            flops += 2.0 * m * n * r
        else:
            room += recompression_flops(m, n, 8 * r, SLOTS * r) / SLOTS
    seconds = moved / rates["bytes"] + flops / rates["flops"]
    return {"bytes": moved, "flops": flops, "seconds": seconds, "recompression": room / rates["flops"]}


def recompression_flops(m: int, n: int, settled: int, new: int) -> float:
    """Operations of :func:`scalora.algebra.lowrank.truncate` from settled + new columns to settled, nothing done twice.

    The new columns against the settled ones, their QR with its Q, the core with its Gram matrix and eigenvectors (9k³
    by Golub and Van Loan), and the factors from them.
    """
    k = settled + new
    sides = (m + n) * (4 * settled * new + 4 * new**2 + 2 * k * settled)
    return sides + (4 + 9) * k**3 + 2 * k**2 * settled


def factorisations(layers: list[AdapterLayer]) -> float:
    """Seconds an event of the adapter store spends on eigenvalues alone, as a recompression asks torch for them."""
    sides = Counter(2 * [SLOTS * layer.rank for layer in layers])
    cores = Counter((8 + SLOTS) * layer.rank for layer in layers)
    seconds = 0.0
    for k, count in (sides + cores).items():
        X = torch.randn(count, k, k, dtype=torch.float64)
        seconds += best(partial(torch.linalg.eigh, X.mT @ X))
    return seconds / SLOTS


def on_smollm2(rank: int, rounds: int, rates: dict[str, float]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for store in STORES:
        model, _ = load_model("smollm2-135m-instruct", head="causal-lm")
        ground = Ground(model, rank, store)
        calls = {"event": ground.event, "adam": ground.adam}
        if store == "base":  # where the loop writes too
            calls["loop"] = ground.loop
        times = seconds_of(calls, rounds)
        content[store] = {
            "layers": len(ground.handle.layers),
            "seconds": times,
            "median": {name: median(values) for name, values in times.items()},
            "floor": floor(ground.handle.layers, store, rates),
        }
        if isinstance(kept := ground.handle.store, AdapterStore):
            content[store]["factorisations"] = factorisations(ground.handle.layers)
            content[store]["recompression"] = best(kept.recompress) / SLOTS
    return content


def over_size(rounds: int) -> list[dict[str, Any]]:
    """Events over m = n, over r and over the number of layers, each from one middle."""
    layers, middle, rank = MIDDLE
    points = [(layers, size, rank) for size in SIZES] + [(layers, middle, r) for r in RANKS]
    points += [(count, NARROW, rank) for count in COUNTS]
    rows = []
    for count, size, rank in dict.fromkeys(points):
        for store in STORES:
            ground = Ground(Stack(count, size), rank, store)
            times = seconds_of({"event": ground.event}, rounds)["event"]
            rows.append({"layers": count, "size": size, "rank": rank, "store": store, "seconds": times})
            del ground
    return rows


def exponents(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each store: the power with which an event's time grows with m = n (all, and the upper half), r and layers."""
    found: dict[str, dict[str, float]] = {}
    layers, middle, rank = MIDDLE
    for store in STORES:
        ours = [row for row in rows if row["store"] == store]
        over_m = [row for row in ours if (row["layers"], row["rank"]) == (layers, rank)]
        studies = {
            "size": over_m,
            f"size from {LARGE}": [row for row in over_m if row["size"] >= LARGE],
            "rank": [row for row in ours if (row["layers"], row["size"]) == (layers, middle)],
            "layers": [row for row in ours if row["size"] == NARROW],
        }
        found[store] = {}
        for what, some in studies.items():
            over, seconds = np.log([(row[what.split()[0]], median(row["seconds"])) for row in some]).T
            found[store][what] = float(np.polyfit(over, seconds, 1)[0])
    return found


def main() -> None:
    parser = record.parser(__doc__, "event.json")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    one_thread()
    rates = machine()
    smollm2 = on_smollm2(options.rank, options.rounds, rates)
    rows = over_size(max(3, options.rounds // 3))
    table = Table("store", "event, ms", "of AdamW's step", "of the loop", "of its floor", "with recompression")
    loop = smollm2["base"]["median"]["loop"]
    for store, found in smollm2.items():
        event, adam = found["median"]["event"], found["median"]["adam"]
        bare = found["floor"]["seconds"]
        ratios = (f"{event / other:.2f}" for other in (adam, loop, bare, bare + found["floor"]["recompression"]))
        table.add_row(store, f"{1e3 * event:.1f}", *ratios)
    Console().print(table)
    apart = smollm2["adapter"]
    Console().print(
        f"adapter store, of an event: {1e3 * apart['recompression']:.1f} ms are its share of a recompression, "
        f"{1e3 * apart['factorisations']:.1f} ms of that are eigenvalues, as torch calls LAPACK for them"
    )
    sizes = Table("layers", "m = n", "r", *(f"{store}, ms" for store in STORES))
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        values = (f"{1e3 * median(row['seconds']):.2f}" for row in (first, second))
        sizes.add_row(str(first["layers"]), str(first["size"]), str(first["rank"]), *values)
    Console().print(sizes)
    Console().print(exponents(rows))
    content = {
        "clock": described(),
        "machine": rates,
        "rank": options.rank,
        "smollm2": smollm2,
        "over_size": rows,
        "exponents": exponents(rows),
    }
    record.write(options.output, content)


if __name__ == "__main__":
    main()
