"""What matters in a refresh: ablations on the turned digits, many runs at once in dense algebra.

    OMP_NUM_THREADS=1 python -m benchmarks.refresh_lab

Every variant is trained at every learning rate with every seed, all as one batch of matrices; the rate is chosen on
500 validation images, 500 test images are scored at that rate. A variant that is there already is not run again.
Writes benchmarks/results/refresh_lab.json and prints its table; rows keep the revision they were obtained with.

This is a second, independent form of the method: the full gradients are formed, nothing is taken from
scalora.engine.refresh.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from scalora.common.environment import environment, git_revision
from scalora.common.files import write_json
from scalora.models.digits import DenseClassifier, digit_rows, digits_mlp

RESULTS = Path("benchmarks/results/refresh_lab.json")
RATES = (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)
SEEDS = 12
SCALE = 2.0
NOISE = {"64 images a step": (64, 400), "4 images a step": (4, 600)}  # batch, steps


@dataclass(frozen=True)
class Variant:
    """Defaults are those of scalora-refresh; ``every=0`` is plain LoRA, ``rank=0`` full fine-tuning."""

    rank: int = 2
    every: int = 25
    source: Literal["two sketches", "all batches", "last batch", "random"] = "two sketches"
    oversampling: int = 0
    halves: Literal["odd-even", "first-second", "same", "A is zero"] = "odd-even"
    size: float = 1.0  # c: squared norm of a column
    warmup: int = 4
    state: Literal["reset", "kept", "v = g²", "Nyström momentum"] = "reset"
    renewed: float = 1.0  # share of the columns, the smallest first
    adam: bool = False  # directions of the gradient over its root mean square
    damping: float | None = None  # of the inputs' second moments, which say what is optimal; None: weights do
    decay: float = 0.0  # AdamW's, of A and B
    schedule: Literal["linear", "cosine", "constant"] = "linear"


class Runs:
    """All runs of one variant. Tensors lead with the run: (R, m, n), R = rates × seeds."""

    def __init__(self, variant: Variant, batch: int, steps: int) -> None:
        self.variant, self.batch, self.steps = variant, batch, steps
        rows = digit_rows("digits-turned")
        self.x, self.y = torch.tensor([r["pixels"] for r in rows]), torch.tensor([r["label"] for r in rows])
        split = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        self.test, self.validation, self.train = split[:500], split[500:1000], split[1000:]
        model = DenseClassifier.from_pretrained(digits_mlp())
        self.rates = torch.tensor([lr for lr in RATES for _ in range(SEEDS)])
        chances = [torch.Generator().manual_seed(100 + i % SEEDS) for i in range(len(self.rates))]
        passes = steps * batch // len(self.train) + 1
        self.order = torch.stack(
            [
                torch.cat([self.train[torch.randperm(len(self.train), generator=g)] for _ in range(passes)])
                for g in chances
            ]
        )
        self.W = [layer.weight.detach().expand(len(chances), -1, -1).clone() for layer in model.layers]  # pyright: ignore
        self.b = [layer.bias.detach() for layer in model.layers]  # pyright: ignore
        self.adapted = range(2)
        r = variant.rank
        self.A = [torch.zeros(*self.W[i].shape[:2], r) for i in self.adapted]
        self.B = [
            torch.stack([torch.empty(n, r).uniform_(-1, 1, generator=g) for g in chances]) / math.sqrt(n)
            for n in (self.W[i].shape[2] for i in self.adapted)
        ]
        self.m = [torch.zeros_like(p) for p in self.parameters()]
        self.v = [torch.zeros_like(p) for p in self.parameters()]
        self.count = [torch.zeros(1, 1, p.shape[2]) for p in self.parameters()]  # of Adam's steps, per column
        self.chance = torch.Generator().manual_seed(1)
        self.mean_square = [torch.zeros_like(self.W[i]) for i in self.adapted]
        self.sketch: list[Tensor] = []
        self.D = [torch.ones(len(chances), 1, self.W[i].shape[2]) for i in self.adapted]
        self.Q: list[Tensor] = []
        self.since = variant.warmup  # steps since the last refresh
        self.losses: list[Tensor] = []

    def parameters(self) -> list[Tensor]:
        return [*self.A, *self.B] if self.variant.rank else self.W[:2]

    def weights(self) -> list[Tensor]:
        if not self.variant.rank:
            return self.W
        return [W + SCALE * self.A[i] @ self.B[i].mT if i in self.adapted else W for i, W in enumerate(self.W)]

    def loss(self, weights: list[Tensor], index: Tensor) -> Tensor:
        """(R), on images (R, batch) or the same (batch) for all."""
        h = self.x[index].expand(len(self.rates), -1, -1)
        self.inputs = []
        for i, (W, b) in enumerate(zip(weights, self.b, strict=True)):
            h = h if i == 0 else h.relu()
            self.inputs.append(h.detach())
            h = torch.baddbmm(b[None, None], h, W.mT)
        wanted = self.y[index].expand(len(self.rates), -1)
        return cross_entropy(h.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape).mean(1)

    def run(self) -> dict[str, object]:
        """Train; the result at the rate that is best on the validation images."""
        for step in range(self.steps):
            self.step(step)
        by_rate = (len(RATES), SEEDS)
        with torch.no_grad():
            validation = self.loss(self.weights(), self.validation).view(by_rate).mean(1).nan_to_num(99.0)
            best = int(validation.argmin())
            test = self.loss(self.weights(), self.test).view(by_rate)[best]
        train = torch.stack(self.losses[-20:]).mean(0).view(by_rate)[best]
        found = {name: [x.mean().item(), x.std().item() / SEEDS**0.5] for name, x in (("train", train), ("test", test))}
        return {"lr": RATES[best], **found, "validation": validation.tolist()}

    def step(self, step: int) -> None:
        leaves = [W.detach().requires_grad_(i in self.adapted) for i, W in enumerate(self.weights())]
        loss = self.loss(leaves, self.order[:, step * self.batch : (step + 1) * self.batch])
        G = list(torch.autograd.grad(loss.sum(), leaves[:2]))
        self.losses.append(loss.detach())
        if self.variant.every and self.variant.rank:
            G = self.watch(step, G)
        gradients = self.projected(G)
        norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
        clip = (1 / (norm + 1e-6)).clamp(max=1)[:, None, None]
        warm = min(1.0, (self.since + 1) / (self.variant.warmup + 1))
        left = 1 - step / self.steps
        schedule = {"linear": left, "cosine": math.sin(math.pi / 2 * left) ** 2, "constant": 1.0}[self.variant.schedule]
        rate = (self.rates * schedule * warm)[:, None, None]
        for p, g, m, v, t in zip(self.parameters(), gradients, self.m, self.v, self.count, strict=True):
            t += 1
            m.lerp_(g * clip, 0.1)
            v.lerp_((g * clip).square(), 1e-3)
            p *= 1 - rate * self.variant.decay
            p -= rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        self.since += 1

    def projected(self, G: list[Tensor]) -> list[Tensor]:
        """The gradients of the parameters from those of the weights."""
        if not self.variant.rank:
            return G
        return [SCALE * g @ B for g, B in zip(G, self.B, strict=True)] + [
            SCALE * g.mT @ A for g, A in zip(G, self.A, strict=True)
        ]

    def watch(self, step: int, G: list[Tensor]) -> list[Tensor]:
        """Gather what the next refresh needs, and refresh when it is due; the gradients that this step shall use."""
        v, phase = self.variant, step % self.variant.every
        for square, g in zip(self.mean_square, G, strict=True):
            square.lerp_(g.square(), 0.01)
        seen = [g / (s.sqrt() + 1e-8) for g, s in zip(G, self.mean_square, strict=True)] if v.adam else G
        seen = [g / D for g, D in zip(seen, self.D, strict=True)]
        if v.source == "two sketches" and step > 0:
            Z = (
                [g.mT @ Q for g, Q in zip(seen, self.Q, strict=True)]
                if self.Q
                else [g @ o for g, o in zip(seen, self.Omega, strict=True)]
            )
            self.sketch = [s + z for s, z in zip(self.sketch, Z, strict=True)] if self.sketch else Z
        elif v.source == "all batches":
            self.sketch = [s + g for s, g in zip(self.sketch, seen, strict=True)] if self.sketch else list(seen)
        if phase == 0:
            if step > 0:
                self.refresh(list(self.directions(seen)), G)
            k = 2 * v.rank + v.oversampling
            self.Omega = [torch.randn(*g.mT.shape[:2], k, generator=self.chance) for g in G]
            self.sketch, self.Q = [], []
            if v.damping is not None:
                for D, x in zip(self.D, self.inputs, strict=False):
                    square = x.square().mean(1, keepdim=True)
                    square /= square.mean(2, keepdim=True)
                    D.copy_(((square + v.damping) / (1 + v.damping)).sqrt())
        elif phase == v.every // 2 and v.source == "two sketches":
            self.Q, self.sketch = [torch.linalg.qr(Y)[0] for Y in self.sketch], []
        return G

    def directions(self, seen: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Singular vectors U, V (R, ·, ≥ 2r) of each layer."""
        for i, g in enumerate(seen):
            if self.variant.source == "random":
                yield tuple(torch.linalg.qr(torch.randn(x.shape, generator=self.chance))[0] for x in (g, g.mT))  # pyright: ignore
            elif self.variant.source == "two sketches":
                basis, R = torch.linalg.qr(self.sketch[i])
                U, _, Vt = torch.linalg.svd(R.mT)
                yield self.Q[i] @ U, basis @ Vt.mT
            else:
                U, _, Vt = torch.linalg.svd(self.sketch[i] if self.sketch else g, full_matrices=False)
                yield U, Vt.mT

    def refresh(self, directions: list[tuple[Tensor, Tensor]], G: list[Tensor]) -> None:
        v, r, momentum = self.variant, self.variant.rank, []
        for i, (U, V) in enumerate(directions):
            first, second = slice(0, 2 * r, 2), slice(1, 2 * r, 2)
            if v.halves == "first-second":
                first, second = slice(0, r), slice(r, 2 * r)
            elif v.halves != "odd-even":
                first = second = slice(0, r)
            A, B = v.size**0.5 * U[..., first], v.size**0.5 * V[..., second] / self.D[i].mT
            if v.halves == "A is zero":
                A = torch.zeros_like(A)
            m_A, m_B = self.m[i] / SCALE, self.m[2 + i] / SCALE
            momentum.append(m_A @ torch.linalg.pinv(self.A[i].mT @ m_A, rtol=1e-3) @ m_B.mT)
            use = (self.A[i].norm(dim=1) * self.B[i].norm(dim=1)).argsort(1).argsort(1)[:, None] < v.renewed * r
            A, B = torch.where(use, A, self.A[i]), torch.where(use, B, self.B[i])
            self.W[i] += SCALE * (self.A[i] @ self.B[i].mT - A @ B.mT)
            self.A[i], self.B[i] = A, B
            if v.renewed < 1:  # Adam's step counter is common to all runs: only the moments of new columns start anew
                for j in (i, 2 + i):
                    self.m[j], self.v[j] = (
                        self.m[j] * ~use,
                        torch.where(use, self.v[j].mean(1, keepdim=True), self.v[j]),
                    )
        self.since = 0
        if v.renewed < 1 or v.state == "kept":
            return
        g, carried = self.projected(G), self.projected(momentum)
        for j, m in enumerate(self.m):
            restarts = v.state == "reset"
            m.copy_(carried[j] if v.state == "Nyström momentum" else torch.zeros_like(m))
            self.v[j].copy_(torch.zeros_like(m) if restarts else torch.maximum(g[j].square(), m.square()))
            self.count[j].fill_(0 if restarts else 10_000)  # with moments there is no bias to correct


def ablations() -> dict[str, list[tuple[str, Variant]]]:
    """Questions and the variants that answer them."""
    ours = Variant()
    both = {"LoRA, r = 2": Variant(every=0), "refresh, r = 2": ours}
    return {
        "against LoRA": [
            ("LoRA, r = 2", Variant(every=0)), ("LoRA, r = 8", Variant(rank=8, every=0)),
            ("LoRA, r = 16", Variant(rank=16, every=0)), ("full", Variant(rank=0, every=0)),
            ("refresh, r = 2", ours), ("refresh, r = 4", replace(ours, rank=4)),
        ],
        "N": [(f"N = {n}", replace(ours, every=n)) for n in (6, 12, 50, 100, 200, 300, 400)],
        "directions": [(source, replace(ours, source=source)) for source in ("all batches", "last batch", "random")]
        + [("of the gradient over its root mean square", replace(ours, adam=True))],
        "columns of the sketches": [(f"2r + {p}", replace(ours, oversampling=p)) for p in (2, 6)],
        "halves": [(h, replace(ours, halves=h)) for h in ("first-second", "same", "A is zero")],
        "size": [(f"c = {c:g}", replace(ours, size=c)) for c in (0.1, 1 / 3, 3.0, 10.0)],
        "warm-up": [(f"{w} steps", replace(ours, warmup=w)) for w in (0, 10)],
        "state": [(s, replace(ours, state=s)) for s in ("kept", "v = g²", "Nyström momentum")],
        "renewed": [("half the columns, the smallest", replace(ours, renewed=0.5))],
        "metric": [(f"inputs' second moments, c = {c:.2g}, damping {d:g}", replace(ours, damping=d, size=c))
                   for c, d in ((1 / 3, 0.1), (1.0, 0.1), (3.0, 0.1), (1.0, 1.0), (1.0, 0.01))],
        "weight decay": [(f"{name}, {d:g}", replace(variant, decay=d))
                         for name, variant in both.items() for d in (0.01, 0.1, 1.0)],
        "schedule": [(f"{name}, {s}", replace(variant, schedule=s))
                     for name, variant in both.items() for s in ("cosine", "constant")],
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    content: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    content |= {
        "command": "python -m benchmarks.refresh_lab",
        "rates": RATES,
        "seeds": SEEDS,
        "environment": environment(),
    }
    for noise, (batch, steps) in NOISE.items():
        print(f"\n{noise}, {steps} steps\n\n| | | lr | training nll | test nll |\n|---|---|---|---|---|")
        for question, variants in ablations().items():
            for label, variant in variants:
                key = f"{noise} / {question} / {label}"
                if key not in content["rows"]:
                    content["rows"][key] = Runs(variant, batch, steps).run() | {"git_revision": git_revision()}
                    write_json(RESULTS, content, depth=3)
                row = content["rows"][key]
                figures = " | ".join("{:.4f} ± {:.4f}".format(*row[name]) for name in ("train", "test"))
                print(f"| {question} | {label} | {row['lr']:g} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
