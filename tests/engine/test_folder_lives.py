"""Random lives of a folder: written by one of many ways, loaded by one of many ways, trained on, exported, resumed.

After each the function is what it was, or a message says no before anything was changed.
"""

import pytest
import torch
from peft import LoraConfig, PeftModel

from helpers.folders import NATIVE, WHOLE, WRITERS
from helpers.lives import TARGETS, Life, output, write_base
from helpers.reading import READERS
from scalora import ScaloraError

LIVES, BLOCKS = 200, 10


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("lives") / "base")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", range(BLOCKS))
def test_the_function_outlives_every_folder(block, base, tmp_path):
    for seed in range(block, LIVES, BLOCKS):
        life = Life(seed, base, tmp_path / str(seed))
        try:
            live(life)
        except Exception as error:
            raise AssertionError(f"life {seed}: {'; '.join(life.diary)}") from error
        life.end()


def live(life):
    for stage in range(life.rng.randint(2, 3)):
        if life.rank > 24:
            return  # of 16 directions: terms that cancel each other grow, and their rounding with them
        life.train()
        ways = [name for name in WRITERS if (not life.native or name in NATIVE) and possible(life, name)]
        way = choose(life, stage, ways, life.seed)
        kind, write = WRITERS[way]
        life.diary.append(f"written by {way}")
        before = output(life.model)
        if life.written and way not in WHOLE:
            files = set(life.folder.rglob("adapter_model*"))
            with pytest.raises(ScaloraError, match="accumulate='base'"):
                write(life)
            same(output(life.model), before)
            assert set(life.folder.rglob("adapter_model*")) == files
            continue
        written = write(life)
        if kind != "checkpoint":  # which trains
            same(output(life.model), before)
        read(life, stage, kind, written)
        if not isinstance(life.model, PeftModel) and not hasattr(life.model, "peft_config"):  # a whole model
            life.native = False
            life.begin(LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"))


def possible(life, way):
    """Whether PEFT and transformers themselves could read again what would be written."""
    if way == "export":
        return not life.config.trainable_token_indices
    return WRITERS[way][0] != "state" or len(life.model.peft_config) == 1


def choose(life, stage, ways, turn):
    """At first each pair of ways of writing and reading in turn, later any."""
    return ways[turn % len(ways)] if stage == 0 else life.rng.choice(ways)


def read(life, stage, kind, written):
    ways = set(READERS[kind])
    if kind == "adapter" and (written / "adapter_model.bin").is_file():
        ways -= {"transformers' load_adapter", "scalora.load"}  # which want safetensors
    if kind == "adapter" and life.config.trainable_token_indices:
        ways -= {"load_adapter beside another"}  # which PEFT could not save any more
    way = choose(life, stage, sorted(ways), life.seed // len(WRITERS))
    life.diary.append(f"loaded by {way}")
    expected = output(life.model)
    if life.written and way == "PeftModel.from_pretrained of a checkpoint":
        with pytest.raises(KeyError, match="LORA, of which a part"):
            READERS[kind][way](life, written)
        return
    if life.written and way == "load_state_dict, plain":  # to PEFT it is one column too many
        with pytest.raises(RuntimeError, match="size mismatch"):
            READERS[kind][way](life, written)
        return
    loaded = READERS[kind][way](life, written)
    model, name = loaded if isinstance(loaded, tuple) else (loaded, life.name)
    same(output(model), expected)
    life.took(model, name)


def same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1.0, float(other.abs().max())))
