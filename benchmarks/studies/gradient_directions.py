"""Where the top singular directions of a gradient lie, and what a step along them is worth: why refreshes help or not.

    python -m benchmarks.studies.gradient_directions recipes/smollm2-gsm8k.yaml --set task.data.folder=../shared/data
    python -m benchmarks.studies.gradient_directions recipes/digits.yaml

The recipe's model is trained as LoRA for some steps; there, mean gradients of the whole weights are taken over three
sets of batches, apart from one another as far as one pass over the data reaches: directions come from the first, the
step from the second, its worth from the third. Nothing is taken from scalora.engine.refresh.refresh. Adds to
benchmarks/results/gradient_directions.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from scalora.layers.peft_lora import find_layers
from scalora.models.load import load_model
from scalora.runs.precision import decide
from scalora.runs.recipe import load_recipe
from scalora.tasks import build_task

from .. import record

SETS = (12, 12, 24)  # batches


class Look(NamedTuple):
    """One layer: mean gradients (m×n) of three sets of batches, E[x xᵀ] (n×n), and the adapters trained so far."""

    gradients: list[Tensor]
    moment: Tensor
    A: Tensor
    B: Tensor


class Ground:
    """A recipe's model with plain LoRA, and its training batches in a fixed order."""

    def __init__(self, recipe: Any) -> None:
        self.recipe, self.precision = recipe, decide(recipe.precision, recipe.training).precision
        task, spec = build_task(recipe.task), recipe.method
        self.model, tokenizer = load_model(
            recipe.model, head=task.head, num_labels=task.num_labels, attn_implementation=recipe.attn_implementation
        )
        torch.manual_seed(0)
        config = LoraConfig(r=spec.rank, lora_alpha=spec.scaled_alpha, target_modules=spec.target_modules)
        self.peft_model = get_peft_model(self.model, config).train()  # pyright: ignore[reportArgumentType]
        self.layers = find_layers(self.peft_model)
        dataset, collate = task.train_dataset(tokenizer), task.collator(tokenizer, self.model)
        self.batches = _batches(dataset, collate, recipe.training["per_device_train_batch_size"])

    def backward(self, batch: dict[str, Tensor]) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
            loss = self.peft_model(**batch).loss
        loss.backward()

    def train(self, steps: int) -> None:
        """AdamW at the recipe's rate, with a short linear warm-up and no decay."""
        trained = [p for layer in self.layers for p in (layer.A, layer.Bt)]
        optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=0.0)
        for step in range(steps):
            self.backward(next(self.batches))
            nn.utils.clip_grad_norm_(trained, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.training["learning_rate"] * min(1.0, (step + 1) / 8)
            optimizer.step()
            optimizer.zero_grad()

    def looks(self) -> Iterator[tuple[str, Look]]:
        """Every layer's; the gradient of the whole weight is that of its frozen part."""
        moments = [torch.zeros(layer.Bt.shape[1], layer.Bt.shape[1]) for layer in self.layers]
        mask: list[Tensor | None] = [None]

        def gather(moment: Tensor) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = args[0].detach().float()
                x = x.flatten(0, -2) if mask[0] is None else x[mask[0].bool()]
                moment.addmm_(x.T, x)

            return hook

        modules: list[Any] = [layer.module for layer in self.layers]
        hooks = [
            module.register_forward_pre_hook(gather(moment)) for module, moment in zip(modules, moments, strict=True)
        ]
        gradients: list[list[Tensor]] = [[] for _ in self.layers]
        for layer in self.layers:
            layer.base.weight.requires_grad_(True)
        for count in SETS:
            for _ in range(count):
                batch = next(self.batches)
                mask[0] = batch.get("attention_mask")
                self.backward(batch)
            for layer, own in zip(self.layers, gradients, strict=True):
                own.append(layer.base.weight.grad / count)  # pyright: ignore[reportOperatorIssue]
                layer.base.weight.grad = None  # pyright: ignore[reportArgumentType]
        for hook in hooks:
            hook.remove()
        for layer, own, moment in zip(self.layers, gradients, moments, strict=True):
            yield layer.name, Look(own, moment, layer.A.detach(), layer.Bt.detach().T)


def _batches(dataset: Any, collate: Any, size: int) -> Iterator[dict[str, Tensor]]:
    """Pass after pass, each in an order of its own; the same in every run."""
    chance = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(len(dataset), generator=chance).tolist()
        for k in range(0, len(order) - size + 1, size):
            yield collate([dataset[i] for i in order[k : k + size]])


def figures(look: Look, chance: torch.Generator) -> dict[str, float]:
    """What is reported of a layer."""
    first, second, third = look.gradients
    Sigma, r = look.moment / look.moment.trace() * look.moment.shape[0], look.A.shape[1]  # an input's mean square is 1
    U, sigma, Vt = torch.linalg.svd(first, full_matrices=False)
    V, e = Vt.T, torch.linalg.eigh(Sigma)[1][:, -1]
    D = ((Sigma.diagonal() + 1) / 2).sqrt()
    U_in, _, Vt_in = torch.linalg.svd(first / D, full_matrices=False)
    adapters = {
        "LoRA's own": (look.A, look.B),
        "random": tuple(torch.linalg.qr(torch.randn(k, r, generator=chance))[0] for k in first.shape),
        "Theorem 1": (U[:, 0 : 2 * r : 2], V[:, 1 : 2 * r : 2]),
        "Theorem 1, inputs scaled": (U_in[:, 0 : 2 * r : 2], Vt_in.T[:, 1 : 2 * r : 2] / D[:, None]),
    }
    found = {
        "share of the 2r top directions in the gradient": float(sigma[: 2 * r].square().sum() / sigma.square().sum()),
        "cosine of two means of gradients": float((second * third).sum() / second.norm() / third.norm()),
        "share of the inputs' top direction e": float(e @ Sigma @ e / Sigma.trace()),
        "cos² of e and the 1st right direction": float((e @ V[:, 0]) ** 2),
        "cos² of e and the 2nd right direction": float((e @ V[:, 1]) ** 2),
    }
    whole = second.sign()
    for name, (A, B) in adapters.items():
        unit = B / B.norm(dim=0)
        found[f"{name}: mean square of x·b, ‖b‖ = 1"] = float(((Sigma @ unit) * unit).sum(0).mean())
        step = (second @ B).sign() @ B.T + A @ (A.T @ second).sign()  # Adam's first step
        found[f"{name}: worth per change of W"] = _worth(step, third, None) / _worth(whole, third, None)
        found[f"{name}: worth per change of Wx"] = _worth(step, third, Sigma) / _worth(whole, third, Sigma)
    return found


def _worth(step: Tensor, G: Tensor, Sigma: Tensor | None) -> float:
    """First-order decrease of the loss by a step whose ‖Δ‖_F, or E‖Δx‖², is one."""
    square = (step * step).sum() if Sigma is None else ((step @ Sigma) * step).sum()
    return float((step * G).sum() / square.sqrt())


def main() -> None:
    parser = record.parser(__doc__, "gradient_directions.json")
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--steps", default="0,60", help="looks after so many steps of LoRA")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, options.overrides)
    content: dict[str, Any] = record.earlier(options.output)
    for steps in map(int, options.steps.split(",")):
        ground, chance = Ground(recipe), torch.Generator().manual_seed(0)
        ground.train(steps)
        by_layer = {name: figures(look, chance) for name, look in ground.looks()}
        total = {name: mean(layer[name] for layer in by_layer.values()) for name in next(iter(by_layer.values()))}
        content[f"{Path(options.recipe).stem} after {steps} steps"] = {
            **record.header(),
            "batches": SETS,
            "mean": total,
            "layers": by_layer,
        }
        record.save(options.output, content)
    table = Table("mean over layers", *content)
    for name in next(iter(content.values()))["mean"]:
        table.add_row(name, *(f"{look['mean'][name]:.3f}" for look in content.values()))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
