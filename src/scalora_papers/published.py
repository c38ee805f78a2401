"""The papers' settings and numbers, as printed (arXiv 2510.23818); fractions of one, rates absolute."""

from __future__ import annotations

from typing import NamedTuple


class GlueSetting(NamedTuple):
    """One column of the GLUE settings."""

    rates: dict[str, float]
    epochs: int
    max_length: int
    warmup: float  # steps; below 1 a share of all
    dropout: float  # of the classifier
    weight_decay: float


def _glue(lora: float, mora: float, hira: float, scalora: float, *rest: float) -> GlueSetting:
    epochs, length, warmup, dropout, decay = rest
    rates = {"lora": lora, "mora": mora, "hira": hira, "scalora": scalora}
    return GlueSetting(rates, int(epochs), int(length), warmup, dropout, decay)


GLUE_SETTINGS = {
    "CoLA": _glue(8e-4, 6e-4, 6e-3, 6e-4, 10, 64, 100, 0.1, 0),
    "SST-2": _glue(6e-4, 6e-4, 6e-3, 6e-4, 2, 128, 500, 0, 0.01),
    "MRPC": _glue(8e-4, 1e-3, 8e-3, 1e-3, 10, 128, 0.1, 0, 0.01),
    "STS-B": _glue(8e-4, 8e-4, 8e-3, 8e-4, 10, 128, 100, 0.2, 0.1),
    "QQP": _glue(5e-4, 5e-4, 5e-3, 5e-4, 5, 320, 1000, 0.2, 0.01),
    "MNLI": _glue(2e-4, 2e-4, 2e-3, 2e-4, 5, 256, 1000, 0.15, 0),
    "QNLI": _glue(4e-4, 4e-4, 4e-3, 4e-4, 3, 512, 500, 0.1, 0.01),
    "RTE": _glue(6e-4, 6e-4, 8e-3, 6e-4, 10, 320, 50, 0.2, 0.01),
}

# Table 1: DeBERTaV3-base, r = 4.
GLUE = {
    "full": dict(zip(GLUE_SETTINGS, (0.6919, 0.9563, 0.8946, 0.9160, 0.9240, 0.8990, 0.9403, 0.8375), strict=True)),
    "lora": dict(zip(GLUE_SETTINGS, (0.6810, 0.9549, 0.8946, 0.9109, 0.9186, 0.9025, 0.9430, 0.8448), strict=True)),
    "mora": dict(zip(GLUE_SETTINGS, (0.6967, 0.9545, 0.8962, 0.9090, 0.9183, 0.9005, 0.9381, 0.8544), strict=True)),
    "hira": dict(zip(GLUE_SETTINGS, (0.6882, 0.9553, 0.8995, 0.9115, 0.9219, 0.9024, 0.9415, 0.8568), strict=True)),
    "scalora": dict(zip(GLUE_SETTINGS, (0.6986, 0.9583, 0.9028, 0.9147, 0.9210, 0.9036, 0.9434, 0.8761), strict=True)),
}

COMMONSENSE_SETS: tuple[str, ...] = ("BoolQ", "PIQA", "SIQA", "HellaSwag", "WinoGrande", "ARC-e", "ARC-c", "OBQA")


def _rates(*values: float) -> dict[str, float]:
    return dict(zip(COMMONSENSE_SETS, values, strict=True))


# Learning rates of table 2 by model and method; "lora@32" is LoRA at four times the rank.
COMMONSENSE_RATES = {
    "LLaMA2-7B": {
        "lora": _rates(8e-4, 4e-4, 4e-4, 4e-4, 1e-4, 1e-4, 4e-4, 4e-4),
        "mora": _rates(8e-4, 4e-4, 4e-4, 4e-4, 1e-4, 2e-4, 2e-4, 4e-4),
        "hira": _rates(8e-3, 4e-3, 4e-3, 2e-3, 1e-3, 2e-3, 4e-3, 4e-3),
        "scalora": _rates(8e-4, 2e-4, 2e-4, 4e-4, 1e-4, 1e-4, 4e-4, 4e-4),
        "lora@32": _rates(8e-4, 2e-4, 2e-4, 2e-4, 1e-4, 1e-4, 2e-4, 2e-4),
    },
    "LLaMA3-8B": {
        "lora": _rates(4e-4, 1e-4, 1e-4, 1e-4, 8e-5, 2e-4, 2e-4, 5e-4),
        "mora": _rates(4e-4, 1e-4, 1e-4, 1e-4, 8e-5, 1e-4, 2e-4, 2e-4),
        "hira": _rates(8e-3, 2e-3, 2e-3, 1e-3, 1e-3, 4e-3, 8e-3, 4e-3),
        "scalora": _rates(4e-4, 1e-4, 1e-4, 1e-4, 8e-5, 8e-5, 4e-4, 5e-4),
        "lora@32": _rates(4e-4, 8e-5, 1e-4, 1e-4, 8e-5, 1e-4, 2e-4, 2e-4),
    },
}

# Table 2, the mean over the eight sets (single sets' values: not collected).
COMMONSENSE_MEANS = {
    "LLaMA2-7B": {
        "lora": 0.7363, "relora": 0.7440, "lora-ga": 0.7434, "mora": 0.7382, "hira": 0.7395, "scalora": 0.7451,
        "scalora-i": 0.7475, "lora@32": 0.7452,
    },
    "LLaMA3-8B": {
        "lora": 0.7683, "relora": 0.7726, "lora-ga": 0.7722, "mora": 0.7727, "hira": 0.7746, "scalora": 0.7785,
        "scalora-i": 0.7757, "lora@32": 0.7754,
    },
}  # fmt: skip

# Fig. 3: memory above LoRA's on LLaMA, GB.
MEMORY_ABOVE_LORA = {"mora": 1.08, "hira": 7.83, "scalora": 0.01, "scalora-i": 0.01}
