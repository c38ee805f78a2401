"""LoFT (2505.21289): LoRA whose factors move in turn, each as AdamW's step of W would move it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from ..algebra.loft import LoftMoments, adam_bound, loft_moments, loft_step, no_loft_moments
from ..algebra.unmagnified import FactorBasis, factor_basis
from ..models.heads import Head
from .lora import Lora
from .method import Adapted, Family
from .support.pair_optimizer import PairOptimizer, PairSide


class Loft(Lora):
    """LoRA's layers and files; the optimizer's state is (m+n)(r² + 2r) for each pair, r/2 + 1 times AdamW's."""

    name = "loft"
    summary = "LoFT (2505.21289): an optimizer of BA that is AdamW of W at full rank"
    family = Family.PAIRS
    shards = False
    has_alpha = False  # all steps of W are the same

    def adapt(self, model: PreTrainedModel, head: Head) -> Adapted:
        adapted = super().adapt(model, head)
        adapted.optimizer = lambda arguments: LoftOptimizer(adapted.model, arguments)
        return adapted


class LoftOptimizer(PairOptimizer):
    """lora_B moves in odd steps, lora_A in even ones; both learn from every gradient.

    Clips to ``max_grad_norm`` by the norms of the dense gradients, projected as those that move see them.
    """

    clips = True

    def step_pairs(self, pairs: Sequence[tuple[PairSide, PairSide]]) -> None:
        looks = [_look(side, turn) for pair in pairs for turn, side in enumerate(pair)]
        factor = self.clip([look.gradient.square().sum() for look in looks if look.moves])
        for side, former, basis, gradient, step, moves in looks:
            moments = loft_moments(former, gradient * factor, basis.Q, step, side.group["betas"])
            side.state.update(moments._asdict())
            if moves:
                direction = loft_step(moments, side.group["eps"], adam_bound(step, side.group["betas"]))
                side.move(basis.magnify(direction) / side.scale)


class _Look(NamedTuple):
    """A factor before any of this step's moves."""

    side: PairSide
    former: LoftMoments
    basis: FactorBasis
    gradient: Tensor  # (k, r): G Q
    step: int
    moves: bool


def _look(side: PairSide, turn: int) -> _Look:
    former = no_loft_moments(side.factor, side.partner)
    if side.state:
        former = LoftMoments(*(side.state[name] for name in LoftMoments._fields))
    basis, step = factor_basis(side.partner), side.count()
    return _Look(side, former, basis, basis.unmagnify(side.gradient) / side.scale, step, step % 2 != turn)


METHODS = (Loft,)
