"""What PEFT's LoraModel must know of ScaLoRA when adapters are switched: both stores rely on it.

PEFT switches adapters by name and makes what it switches on trainable. TRL's reference pass, Trainer's resume,
add_adapter() and the end of disable_adapter() all do so with the trained adapter's name alone: the accumulated one
would be left behind, or begin to gather gradients. And a base that was written to is no reference any more.
"""

from __future__ import annotations

from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn

from ...common.errors import ScaloraError
from ...layers.adopt import adopt
from ...layers.peft_lora import ACCUMULATED, find_peft_model


class AccumulatedFollows(LoraModel):
    """A LoraModel whose accumulated adapter goes wherever the trained one goes, and stays frozen."""

    trained = ""  # the adapter that the accumulated one belongs to
    base_written = False  # by accumulate='base'

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if self.trained in names and ACCUMULATED not in names and ACCUMULATED in self.peft_config:
            names.append(ACCUMULATED)
        super().set_adapter(names, inference_mode=inference_mode)
        freeze_accumulated(self)

    def enable_adapter_layers(self) -> None:
        super().enable_adapter_layers()
        freeze_accumulated(self)

    def disable_adapter_layers(self) -> None:
        if self.base_written:
            raise ScaloraError(
                "disable_adapter() would not give the untouched base, since accumulate='base' has written to it (a "
                "reference policy would drift along with the training): choose accumulate='adapter'"
            )
        super().disable_adapter_layers()


def pair(peft_model: PeftModel, trained: str) -> None:
    """From now on whoever switches ``trained`` on or off does the same to the accumulated adapter.

    Raises:
        ScaloraError: the accumulated adapter belongs to another one.
    """
    tuner = adopt(peft_model.base_model, AccumulatedFollows)
    if tuner.trained not in ("", trained) and ACCUMULATED in peft_model.peft_config:
        raise ScaloraError(
            f"the accumulated adapter of this model belongs to adapter {tuner.trained!r}, and {trained!r} is to be "
            f"trained now: save {tuner.trained!r} with scalora.save_plain_lora, then call "
            f"model.delete_adapter({ACCUMULATED!r})"
        )
    tuner.trained = trained


def activate(model: nn.Module) -> None:
    """Make the accumulated adapter active, and frozen, beside whatever is active now."""
    peft_model = find_peft_model(model)
    active = list(peft_model.active_adapters)
    if ACCUMULATED not in active:
        trainable = {name for name, p in peft_model.named_parameters() if p.requires_grad}
        peft_model.base_model.set_adapter([*active, ACCUMULATED])  # pyright: ignore[reportCallIssue]
        for name, param in peft_model.named_parameters():  # set_adapter made every active adapter trainable
            param.requires_grad_(name in trainable)
    freeze_accumulated(peft_model)


def freeze_accumulated(model: nn.Module) -> None:
    """Let no gradient reach the accumulated adapter."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and ACCUMULATED in module.lora_A:
            module.lora_A[ACCUMULATED].requires_grad_(False)
            module.lora_B[ACCUMULATED].requires_grad_(False)
