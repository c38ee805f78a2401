"""Gradients with respect to the frozen weights, for the methods that start from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.pytorch_utils import Conv1D

from ...common.errors import ScaloraError
from ...layers.peft_lora import AdapterLayer, is_dense


class FullGradients:
    """Gathers G = ∂ℓ/∂W, m×n, of frozen weights in the backward passes between :meth:`open` and :meth:`close`.

    They never appear as ``.grad``, so that neither clipping nor the optimizer sees them. Nor does DDP: :meth:`close`
    takes their mean over the processes itself.

    Raises:
        ScaloraError: a weight is quantised.
    """

    def __init__(self, layers: Sequence[AdapterLayer]) -> None:
        for layer in layers:
            if not is_dense(layer):
                raise ScaloraError(
                    f"the full gradient of layer {layer.name} ({type(layer.base).__name__}) cannot be had: load the "
                    "model unquantised, or leave the layer out of method.target_modules"
                )
        self.layers = layers
        self.sums: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def open(self) -> None:
        """From now on gradients are computed and summed up."""
        self.sums = {}
        for layer in self.layers:
            weight = layer.base.weight
            assert isinstance(weight, nn.Parameter)
            weight.requires_grad_(True)
            self._hooks.append(weight.register_post_accumulate_grad_hook(self._gatherer(layer)))

    def close(self) -> dict[str, Tensor]:
        """The sums by layer name, float32, the mean over processes; the weights are as frozen as before."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for layer in self.layers:
            layer.base.weight.requires_grad_(False)  # pyright: ignore
        sums, self.sums = self.sums, {}
        if (processes := _processes()) == 1:
            return sums
        for layer in self.layers:
            own = sums.setdefault(layer.name, torch.zeros(layer.shape, device=layer.base.weight.device))  # pyright: ignore
            dist.all_reduce(own)
        return {name: total / processes for name, total in sums.items() if total.any()}

    def _gatherer(self, layer: AdapterLayer) -> Any:
        def gather(weight: Tensor) -> None:
            assert weight.grad is not None
            gradient = weight.grad.T if isinstance(layer.base, Conv1D) else weight.grad
            earlier = self.sums.get(layer.name)
            self.sums[layer.name] = gradient.float() if earlier is None else earlier + gradient
            weight.grad = None

        return gather


def batch_loss(model: nn.Module, batch: Any, args: TrainingArguments) -> Tensor:
    """The model's own loss on one collated batch, in the precision that Trainer trains in."""
    parameter = next(model.parameters())
    inputs = {k: v.to(parameter.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    with torch.autocast(parameter.device.type, dtype=dtype, enabled=args.bf16 or args.fp16):
        return model(**inputs).loss


def gradients_of(loss: Tensor, params: Sequence[Tensor]) -> list[Tensor | None]:
    """Those of parameters that DDP knows nothing of: the mean over processes, which thus stay alike."""
    found: list[Tensor | None] = list(torch.autograd.grad(loss, params, allow_unused=True))
    if (processes := _processes()) == 1:
        return found
    own = [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]
    for gradient in own:
        dist.all_reduce(gradient)
        gradient /= processes
    return [*own]


def mean_gradients(
    model: nn.Module, layers: Sequence[AdapterLayer], loader: DataLoader[Any], args: TrainingArguments, batches: int
) -> dict[str, Tensor]:
    """The mean gradient of each layer's frozen weight over the first micro-batches of a shuffled pass, m×n.

    Each of several processes reads as many, and others than the rest.
    Neither ``loader`` nor the randomness of the run is touched: the training data keep their order.
    """
    own = DataLoader(
        loader.dataset,
        batch_size=args.per_device_train_batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(args.seed),
        collate_fn=loader.collate_fn,
    )
    gradients = FullGradients(layers)
    with torch.random.fork_rng(), _training(model):
        gradients.open()
        processes, count = _processes(), 0
        for batch, turn in zip(own, range(batches * processes), strict=False):
            count += 1
            if turn % processes == args.process_index:
                batch_loss(model, batch, args).backward()
        sums = gradients.close()
    model.zero_grad()
    return {name: total * processes / max(1, count) for name, total in sums.items()}


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    before = model.training
    model.train()
    try:
        yield
    finally:
        model.train(before)


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
