"""Families of models, each made tiny from its own config and trained by Trainer with ScaLoRA's callback."""

from importlib.util import find_spec

import pytest
import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainingArguments

from helpers.attached import frozen
from helpers.families import FAMILIES
from scalora import ScaLoraCallback, ScaLoraConfig
from scalora.algebra.lowrank import numerical_rank, singular_values
from scalora.engine.plain_lora import joined_factors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Watched(TrainerCallback):
    """What each event changes in the outputs, where these exceed 1 as a share of the greatest."""

    def __init__(self, ours, family):
        self.ours, self.family, self.changes = ours, family, []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        inner = self.ours.handle.rescale

        def event():
            before = self.family.outputs(model)
            inner()
            size = max(1.0, before.abs().max().item())
            self.changes.append((self.family.outputs(model) - before).abs().max().item() / size)

        self.ours.handle.rescale = event


@pytest.mark.parametrize("case", FAMILIES)
def test_trained_saved_and_loaded(case, tmp_path):
    family = FAMILIES[case]
    if find_spec(family.needs) is None:
        pytest.skip(f"{family.needs} is not installed")
    model = family.adapted()
    before = frozen(model)
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=20, per_device_train_batch_size=8, learning_rate=5e-3, report_to="none",
        use_cpu=True, disable_tqdm=True, remove_unused_columns=False, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    ours = ScaLoraCallback(ScaLoraConfig(interval=2))
    watched = Watched(ours, family)
    trainer = Trainer(model, arguments, train_dataset=family.rows(), callbacks=[ours, watched])
    trainer.train()
    assert len(watched.changes) == 10
    assert max(watched.changes) < 1e-5
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], values[0]) for name, values in before.items())
    for layer in ours.handle.layers:
        P, Q = joined_factors(layer)
        ranks = numerical_rank(singular_values(P.double(), Q.double()), *layer.shape)
        assert ranks.min() > layer.rank, layer.name  # of each expert
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(family.base(), tmp_path / "adapter")
    torch.testing.assert_close(family.outputs(again), family.outputs(model), rtol=0, atol=1e-5)
