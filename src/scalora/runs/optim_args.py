"""`optim_args`: which entries transformers reads for which `optim`; it passes over any other without a word.

Source: transformers' trainer_optimizer.py; a test asks each of its handlers.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

_SCHEDULE_FREE = ("weight_lr_power", "r")
_ADEMAMIX = ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3")
_GALORE = ("rank", "update_proj_gap", "scale", "proj_type")
_TORCHAO = ("block_size", "bf16_stochastic_round")
READ: Mapping[str, tuple[str, ...]] = {
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
    "adagrad": ("lr_decay", "weight_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "weight_decay", "centered"),
    "adamw_anyprecision": (
        "use_kahan_summation", "momentum_dtype", "variance_dtype", "compensation_buffer_dtype",
    ),
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), _TORCHAO),
    **dict.fromkeys(("schedule_free_adamw", "schedule_free_sgd", "schedule_free_radam"), _SCHEDULE_FREE),
    **dict.fromkeys(("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"), _ADEMAMIX),
    "grokadamw": ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping"),
    "stable_adamw": ("max_lr", "kahan_sum", "decouple_lr"),
    **dict.fromkeys(
        (f"galore_{name}{layerwise}" for name in ("adamw", "adamw_8bit", "adafactor")
         for layerwise in ("", "_layerwise")), _GALORE,
    ),
    **dict.fromkeys(("apollo_adamw", "apollo_adamw_layerwise"), (*_GALORE, "proj", "scale_type")),
}  # fmt: skip
# These get all of them as arguments, and refuse what they do not know.
WHOLE = ("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit")


def refuse_unread(optim: str, given: str) -> None:
    """Raise ValueError where an entry of `optim_args` ("key=value,…") would be passed over with this optimizer."""
    if optim in WHOLE:
        return
    read = READ.get(optim, ())
    for key in (part.split("=")[0].strip() for part in given.split(",")):
        if key in read:
            continue
        if not read:
            raise ValueError(
                f"optim_args is {given!r}, but transformers reads none with optim: {optim}; leave it out (learning "
                "rate, weight decay, betas and epsilon have fields of their own)"
            )
        near = get_close_matches(key, read, n=1, cutoff=0.7)
        hint = f"; did you mean {near[0]!r}?" if near else f": choose from {', '.join(read)}"
        raise ValueError(f"optim_args names {key!r}, which transformers does not read with optim: {optim}{hint}")
