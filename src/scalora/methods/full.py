"""Full fine-tuning of the targeted modules: what every low-rank method tries to match."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..models.heads import Head
from .method import Adapted, Family, Method
from .support.whole_weights import train_whole


class Full(Method):
    """The targeted modules' weights (not their biases) are trained themselves; rank, alpha and dropout mean nothing."""

    name = "full"
    summary = "full fine-tuning by the recipe's optimizer"
    family = Family.WHOLE
    packed = ()
    lr_factor = 0.1
    has_alpha = False

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        return train_whole(model, self.spec, head)


METHODS = (Full,)
