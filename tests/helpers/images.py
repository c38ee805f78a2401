"""Small pictures, and a ViT that reads them, made on the spot."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

COLOURS = {"blue": (20, 30, 220), "green": (30, 200, 40), "red": (220, 40, 30)}


def picture(number: int) -> Image.Image:
    """One of a class by its colour, told from others by a stripe."""
    made = Image.new("RGB", (12, 10), list(COLOURS.values())[number % 3])
    made.paste((number, 255 - number, 128), (0, 0, 1 + number % 5, 10))
    return made


def lay(folder: Path, count: int = 60, ending: str = "png") -> Path:
    """A folder for each class, with images in them."""
    for number in range(count):
        path = folder / list(COLOURS)[number % 3] / f"{number}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    return folder


def vit(num_labels: int = 2) -> ViTForImageClassification:
    torch.manual_seed(5)
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_labels=num_labels, initializer_range=0.3,
    )  # fmt: skip
    return ViTForImageClassification(config)


def processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": 8, "width": 8})
