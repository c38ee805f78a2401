"""What would be lost if a bf16 base kept the sum with its accumulated columns in bf16, as float32 ones keep theirs.

    python -m benchmarks.studies.rounded_sum --lr 1e-4,1e-3 --steps 60

SmolLM2 in bf16 learns random token sequences with ScaLoRA-I. Then its logits are computed in float32 throughout, the
base's bf16 values included: that is the truth. Beside it stand the model in bf16 with thin products, as it is; with
each W + Σ s·P Qᵀ rounded to the nearest bf16 number; rounded up or down by chance, which is right on average; and
without accumulated columns at all. Writes OUTPUT/rounded_sum.json: the distance of each to the truth, and how much of
what was learnt is missing in it, both as shares of all that training has changed in the logits.
"""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import Tensor

import scalora
from scalora.layers.lora_forward import LoraForward
from scalora.layers.products import add_adapters
from scalora.models.load import load_model

from .. import record

WAYS = ("thin products", "nearest", "by chance", "left out")
MODEL, TOKENS = "smollm2-135m-instruct", (1000, 20_000)
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def rounded(S: Tensor, way: str) -> Tensor:
    """S in bf16: the nearest number, or one of the two neighbours, with a chance that makes it right on average."""
    if way == "nearest":
        return S.bfloat16()
    low_bits = torch.randint(0, 1 << 16, S.shape, dtype=torch.int32)
    return ((S.view(torch.int32) + low_bits) & ~0xFFFF).view(torch.float32).bfloat16()


def short(way: str) -> Any:
    """A short forward pass in which the frozen columns are part of a rounded weight, or absent."""

    def pass_(self: LoraForward, x: Tensor, adapters: list[Any]) -> Tensor:
        base: Any = self.base_layer
        trained = [each for each in adapters if each.lora_A.requires_grad]
        W = base.weight
        if way != "left out" and len(trained) < len(adapters):
            W = base.weight.float()
            for each in (each for each in adapters if not each.lora_A.requires_grad):
                W = W + each.scale * each.lora_B @ each.lora_A
            W = rounded(W, way)
        result = torch.nn.functional.linear(x, W, base.bias)
        return add_adapters(result, x, trained, torch.float32)

    return pass_


def trained_model(lr: float, steps: int, ids: Tensor) -> Any:
    """SmolLM2 in bf16 after so many steps of ScaLoRA-I."""
    model, _ = load_model(MODEL, head="causal-lm", dtype="bfloat16")
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))  # pyright: ignore
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    scalora.attach(model, optimizer)
    for step in range(steps):
        batch = ids[step % len(ids)]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def errors(model: Any, ids: Tensor) -> dict[str, dict[str, float]]:
    """Of the logits, by way: how far from the truth; and what part of the learnt change they lack, noise apart."""
    exact = copy.deepcopy(model).float()
    truth = exact(input_ids=ids).logits
    with model.disable_adapter(), exact.disable_adapter():
        learnt = truth - exact(input_ids=ids).logits
        noise = model(input_ids=ids).logits.float() - exact(input_ids=ids).logits  # of a base in bf16
    found = {"the base itself": _compared(noise, learnt)}
    for way in WAYS:
        with patch.object(LoraForward, "_short", LoraForward._short if way == "thin products" else short(way)):
            found[way] = _compared(model(input_ids=ids).logits.float() - truth, learnt)
    return found


def _compared(error: Tensor, learnt: Tensor) -> dict[str, float]:
    size = learnt.norm()
    return {"distance": float(error.norm() / size), "missing": -float((error * learnt).sum() / size.square())}


def main() -> None:
    parser = record.parser(__doc__, "")
    parser.add_argument("--lr", default="1e-5,1e-4,1e-3")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    ids = torch.randint(*TOKENS, (4, 4, 48), generator=torch.Generator().manual_seed(0))
    shares = {}
    for lr in options.lr.split(","):
        shares[lr] = errors(trained_model(float(lr), options.steps, ids), ids[0])
        Console().print(lr, shares[lr])
    record.write(options.output / "rounded_sum.json", {"errors": shares, "steps": options.steps})


if __name__ == "__main__":
    main()
