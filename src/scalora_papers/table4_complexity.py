"""What an event costs beside a LoRA step, over m, n, r and I, against the operation counts of the formulas.

One linear layer is trained for a few steps by the library itself: a PEFT model, AdamW, :func:`scalora.attach`. Clocks
around the engine's event and its store's operations tell the parts of a step apart.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from scalora.engine.attach import attach
from scalora.engine.config import Accumulate, ScaLoraConfig
from scalora.engine.event import ScaLora
from scalora.engine.stores.adapter import SLOTS, AdapterStore

from .base import Experiment, Outcome, Setting, TextTable

TOKENS = 64  # T, the rows of a batch
_WIDTH = 8 + SLOTS  # k/r, where a layer has room for k accumulated columns
_BEYOND = 1.5  # a time tells of arithmetic from that many fixed costs on
_STORES: tuple[Accumulate, ...] = ("base", "adapter")


class Size(NamedTuple):
    m: int
    n: int
    r: int


_TINY = Size(8, 8, 1)  # arithmetic takes no time in it: what is left is the fixed cost of calls


class Part(NamedTuple):
    """A part of a step: its formula to read, and to count operations that are fitted as the times are."""

    title: str
    formula: str
    operations: Callable[[float, float, float], float]


PARTS = {
    "step": Part("LoRA step", "T(mn + (m+n)r)", lambda m, n, r: m * n + (m + n) * r),
    "beside": Part("LoRA step with store", "T(mn + (m+n)(k+r))", lambda m, n, r: m * n + (m + n) * (_WIDTH + 1) * r),
    "factors": Part("event: α, β, state", "(m+n)r² + r³", lambda m, n, r: (m + n + r) * r**2),
    "merge": Part("event: add to a dense W", "mnr", lambda m, n, r: m * n * r),
    "append": Part("event: append to adapter", "(m+n)r", lambda m, n, r: (m + n) * r),
    "recompress": Part(
        f"recompression, 1 event in {SLOTS}", "(m+n)k² + k³", lambda m, n, r: (m + n + _WIDTH * r) * (_WIDTH * r) ** 2
    ),
}


class Clock:
    """Seconds of every call by part, without other parts within it; CUDA is synchronised before and after."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._within = 0.0  # seconds of parts inside the one that runs

    def timed(self, part: str, function: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any, **named: Any) -> None:
            outside, self._within, start = self._within, 0.0, self._now()
            function(*args, **named)
            whole = self._now() - start
            self.seconds[part].append(whole - self._within)
            self._within = outside + whole

        return run

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()  # of all threads; other programs on the machine do not lengthen it much


class Cost(NamedTuple):
    """Median seconds of each part, and seconds spent in events per step, a mean."""

    size: Size
    store: Accumulate
    interval: int
    seconds: dict[str, float]
    events: float


def measure_cost(size: Size, store: Accumulate, interval: int, *, steps: int, device: str) -> Cost:
    """Train one m×n layer for that many steps, with an event before every ``interval``-th of them."""
    model, handle = _attached(size, store, interval, device)
    X = torch.randn(TOKENS, size.n, device=device, requires_grad=True)  # a deep model wants ∂ℓ/∂X too
    Y = torch.randn(TOKENS, size.m, device=device)

    def backward() -> None:
        (model(X) - Y).square().mean().backward()

    def step() -> None:
        backward()
        handle.optimizer.step()
        handle.optimizer.zero_grad()

    step()
    backward()
    for _ in range(_WIDTH):  # until every slot is in use: from here on the store is in its steady state
        handle.rescale()
    handle.step = 0  # an event comes first
    clock = Clock(device)
    handle.rescale = clock.timed("factors", handle.rescale)
    handle.store.receive = clock.timed("merge" if store == "base" else "append", handle.store.receive)
    if isinstance(handle.store, AdapterStore):
        handle.store.recompress = clock.timed("recompress", handle.store.recompress)
    timed_step = clock.timed("step" if store == "base" else "beside", step)
    for _ in range(steps):
        timed_step()
    events = sum(sum(times) for part, times in clock.seconds.items() if part not in ("step", "beside")) / steps
    return Cost(size, store, interval, {part: median(times) for part, times in clock.seconds.items()}, events)


def memory(size: Size, store: Accumulate, dtype: torch.dtype) -> dict[str, Any]:
    """Bytes of tensors, counted one by one: LoRA's own A and B, the store's, and what one event leaves besides."""
    model, handle = _attached(size, store, 1, "cpu", dtype)
    (layer,) = handle.layers
    frozen = {"P": layer.accumulated.P, "Qt": layer.accumulated.Qt} if store == "adapter" else {}
    model(torch.randn(2, size.n, dtype=dtype)).square().mean().backward()
    before = _bytes(handle.state_dict())
    handle.optimizer.step()
    return {
        **size._asdict(),
        "store": store,
        "model": str(dtype).removeprefix("torch."),
        "A and B": _bytes({"A": layer.lora_B, "Bt": layer.lora_A}),
        "buffers of the store": _bytes(frozen) + _bytes(handle.store.state_dict()),
        "left by an event besides": _bytes(handle.state_dict()) - before,
    }


class Law(NamedTuple):
    """seconds = fixed + factor·mᵖ nᵠ rˢ; lists are of p, q, s and p + q, empty where the fixed cost hides them."""

    fixed: float
    used: str  # how many of the points are far enough from the fixed cost
    exponents: list[float]
    errors: list[float]  # standard errors
    formula: list[float]  # exponents that the same fit gives to the formula's operations
    factor: float

    def seconds(self, m: float, n: float, r: float) -> float:
        p, q, s, _ = self.exponents or [0.0] * 4
        return self.fixed + self.factor * m**p * n**q * r**s


def fit_law(points: Sequence[tuple[Size, float, float]], operations: Callable[..., float]) -> Law:
    """Least squares of log(t - fixed) in log m, log n and log r over (size, t, fixed), where t is clear of fixed."""
    beyond = [(size, t - fixed) for size, t, fixed in points if t > _BEYOND * fixed]
    fixed, used = median(fixed for *_, fixed in points), f"{len(beyond)} of {len(points)}"
    design = np.array([[1, *np.log(size)] for size, _ in beyond]).reshape(-1, 4)
    if len(beyond) < max(5, len(points) / 2) or np.linalg.matrix_rank(design) < 4:  # a few would be chosen by noise
        return Law(fixed, used, [], [], [], 0.0)
    target = np.log([[t, operations(*size)] for size, t in beyond])
    solution = np.linalg.lstsq(design, target, rcond=None)[0]
    variance = np.square(target - design @ solution)[:, 0].sum() / (len(beyond) - 4)
    wanted = np.array([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 1, 1, 0]])
    errors = np.sqrt(np.diag(wanted @ np.linalg.inv(design.T @ design) @ wanted.T) * variance)
    exponents, formula = (wanted @ solution).T.tolist()
    return Law(fixed, used, exponents, errors.tolist(), formula, float(np.exp(solution[0, 0])))


class Complexity(Experiment):
    """Times and bytes of steps and events, both stores, with fitted exponents."""

    name = "table4"
    summary = "ScaLoRA's costs: time and memory of events and steps over m, n, r and I, against the formulas"
    sizes: Mapping[str, Sequence[int]] = {"small": (256, 512, 1024, 2048), "paper": (256, 512, 1024, 2048, 4096, 8192)}
    ranks: Mapping[str, Sequence[int]] = {"small": (4, 8, 16, 32), "paper": (4, 8, 16, 32, 64)}
    intervals: Sequence[int] = (1, 2, 5, 10)
    steps = 20

    def run(self, setting: Setting) -> Outcome:
        sizes, ranks = self.sizes[setting.scale], self.ranks[setting.scale]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        middle, rank = sizes[-2], ranks[len(ranks) // 2]
        plan = [Size(n, n, r) for n in sizes for r in ranks]
        plan += [size for n in sizes if n != middle for size in (Size(n, middle, rank), Size(middle, n, rank))]
        costs, tiny, laws = [], [], {}
        for size in plan:
            setting.log(f"m, n, r = {', '.join(map(str, size))}")
            for store in _STORES:  # fixed costs at the same time, because a busy machine's speed drifts
                tiny.append(measure_cost(_TINY, store, interval=1, steps=self.steps, device=device))
                costs.append(measure_cost(size, store, interval=1, steps=self.steps, device=device))
        centre = Size(middle, middle, rank)
        long = SLOTS * max(self.intervals)  # one recompression at the greatest I
        over_I = [measure_cost(centre, *each, steps=long, device=device) for each in product(_STORES, self.intervals)]
        for part in PARTS:
            pairs = [(c, t) for c, t in zip(costs, tiny, strict=True) if part in c.seconds]
            points = [(c.size, c.seconds[part], t.seconds[part]) for c, t in pairs]
            laws[part] = fit_law(points, PARTS[part].operations)
        sampled = plan[0], centre, Size(sizes[-1], sizes[-1], ranks[-1])
        held = [memory(*each) for each in product(sampled, _STORES, (torch.float32, torch.bfloat16))]
        content = {
            "measured_on": {"device": device, "threads": torch.get_num_threads(), "tokens": TOKENS},
            "seconds": [cost._asdict() for cost in (*tiny, *costs, *over_I)],
            "laws": {part: law._asdict() for part, law in laws.items()},
            "bytes": held,
        }
        title = "Bytes of tensors, counted exactly; what lives only within an event is not counted"
        bytes_table = TextTable(title, list(held[0]), [list(map(str, row.values())) for row in held])
        tables = [_exponents(laws), _intervals(over_I), bytes_table]
        return Outcome(content, tables, {"complexity": _draw(costs, laws, centre)}, _remarks(laws, over_I))


def _attached(
    size: Size, store: Accumulate, interval: int, device: str, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, ScaLora]:
    model = nn.Sequential(nn.Linear(size.n, size.m, bias=False, device=device, dtype=dtype))
    model = get_peft_model(model, LoraConfig(r=size.r, lora_alpha=size.r, target_modules=["0"]))  # pyright: ignore
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    return model, attach(model, optimizer, ScaLoraConfig(interval=interval, accumulate=store))


def _bytes(value: Any) -> int:
    """Of all tensors in a state dict."""
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _exponents(laws: Mapping[str, Law]) -> TextTable:
    rows = []
    for part, law in laws.items():
        triples = zip(law.exponents, law.errors, law.formula, strict=True)
        cells = [f"{p:.2f} ± {error:.2f} ({formula:.2f})" for p, error, formula in triples] or ["hidden"] * 4
        rows.append([PARTS[part].title, PARTS[part].formula, *cells, f"{1e3 * law.fixed:.2f}", law.used])
    title = "Exponents of time beyond the fixed cost ± standard error (in brackets: of the formula, by the same fit)"
    return TextTable(title, ["part", "O(…)", "m", "n", "r", "m = n", "fixed cost, ms", "points"], rows)


def _intervals(over_I: Sequence[Cost]) -> TextTable:
    plain = median(c.seconds["step"] for c in over_I if "step" in c.seconds)
    (m, n, r), ms, rows = over_I[0].size, 1e3 * plain, []
    for c in over_I:
        longer = c.seconds.get("beside", plain) - plain
        together = f"{(c.events + longer) / plain:.1%}"
        rows.append([c.store, str(c.interval), f"{1e3 * c.events:.2f}", f"{1e3 * longer:.2f}", together])
    title = f"Added to a LoRA step of {ms:.2f} ms ({TOKENS} tokens, one layer with m = {m}, n = {n}, r = {r})"
    columns = ["store", "I", "events, ms per step", "accumulated columns in the step, ms", "together"]
    return TextTable(title, columns, rows)


def _remarks(laws: Mapping[str, Law], over_I: Sequence[Cost]) -> list[str]:
    remarks = []
    for part, law in laws.items():
        triples = zip(("m", "n", "r", "m = n"), law.exponents, law.errors, law.formula, strict=False)
        far = [f"{name} ({p - formula:+.2f})" for name, p, error, formula in triples if abs(p - formula) > 2 * error]
        found = f"more than two standard errors from its formula in {', '.join(far)}" if far else "as its formula says"
        remarks.append(f"{PARTS[part].title}: {found if law.exponents else 'the fixed cost of calls hides it'}")
    for store in _STORES:
        interval, seconds = zip(*((c.interval, c.events) for c in over_I if c.store == store), strict=True)
        slope = np.polyfit(np.log(interval), np.log(seconds), 1)[0]
        remarks.append(f"{store}: seconds in events per step have exponent {slope:.2f} in I (formula: -1)")
    return remarks


def _draw(costs: Sequence[Cost], laws: Mapping[str, Law], centre: Size) -> Figure:
    """Milliseconds over m = n and over r, with the fixed costs and fitted powers as lines."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    over_size, over_rank = figure.subplots(1, 2, sharey=True)
    sizes, ranks = sorted({c.size.n for c in costs}), sorted({c.size.r for c in costs})
    many, several = np.geomspace(sizes[0], sizes[-1]), np.geomspace(ranks[0], ranks[-1])
    for i, (part, law) in enumerate(laws.items()):
        style = {"color": f"C{i}"}
        for c in (c for c in costs if part in c.seconds):
            if c.size == (c.size.n, c.size.n, centre.r):
                over_size.plot(c.size.n, 1e3 * c.seconds[part], "o", **style)
            if c.size == (centre.m, centre.n, c.size.r):
                over_rank.plot(c.size.r, 1e3 * c.seconds[part], "o", **style)
        over_size.plot(many, [1e3 * law.seconds(n, n, centre.r) for n in many], label=PARTS[part].title, **style)
        over_rank.plot(several, [1e3 * law.seconds(centre.m, centre.n, r) for r in several], **style)
    over_size.set(ylabel="milliseconds")
    panels = (over_size, "m = n", f"r = {centre.r}", sizes), (over_rank, "r", f"m = n = {centre.n}", ranks)
    for axis, label, title, ticks in panels:
        axis.set(xscale="log", yscale="log", xlabel=label, title=title)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
    figure.legend(*over_size.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


EXPERIMENTS = (Complexity,)
