"""Ground and short runs for exports, and what their results compute."""

import torch

from helpers import tokenized, workspace
from scalora.runs.recipe import load_recipe
from scalora.runs.training import train

IDS = torch.randint(4, tokenized.SIZE, (4, 8), generator=torch.Generator().manual_seed(1))


def lay(folder):
    recipe = workspace.lay(folder)
    tied = tokenized.llama()
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    for name, model in (("gpt2", tokenized.gpt2()), ("tied", tied)):
        model.save_pretrained(folder / name)
        tokenized.tokenizer().save_pretrained(folder / name)
    return recipe


def run(recipe, name, *overrides):
    method = [each for each in overrides if each.startswith("method=")]
    short = ["training.max_steps=4", "training.save_steps=2", f"output={recipe.parent / name}"]
    others = [each for each in overrides if not each.startswith("method=")]
    return train(load_recipe(recipe, [*method, "method.rank=2", *short, *others]), baseline=False)


def logits(lines, dtype=None):
    """What the lines that a run prints compute."""
    names, lines = {}, "\n".join(lines)
    exec(lines.replace("')", f"', dtype={dtype!r})") if dtype else lines, names)
    with torch.no_grad():
        return names["model"].float().eval()(input_ids=IDS).logits
