"""Documents packed into blocks without seeing one another."""

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, RwkvConfig, RwkvForCausalLM
from typer.testing import CliRunner

from helpers import tokenized, workspace
from scalora.cli import app
from scalora.common.errors import ScaloraError
from scalora.runs.recipe import load_recipe
from scalora.runs.training import train
from scalora.tasks import build_task
from scalora.tasks.text import TextSpec

ROWS = [{"text": text} for text in ("the cat sat on the mat", "sky is blue", "who ran on the red mat", "no", "a b c d")]


def task(tmp_path, **fields):
    path = tokenized.write_jsonl(tmp_path / "documents.jsonl", ROWS)
    return build_task(TextSpec(data={"train": path, "test": path}, documents="apart", **fields))


@pytest.mark.parametrize("max_length", [2, 3, 5, 8, 50])
def test_every_token_is_learnt_once_after_its_own_document(tmp_path, max_length):
    tokenizer = tokenized.tokenizer()
    blocks = list(task(tmp_path, max_length=max_length).train_dataset(tokenizer, "test"))
    learnt = [token for block in blocks for token in block["labels"] if token != -100]
    assert tokenizer.decode(learnt) == " <eos> ".join(row["text"] for row in ROWS) + " <eos>"
    assert all(max_length - 1 <= len(block["input_ids"]) <= max_length for block in blocks[:-1])
    for block in blocks:
        for place, (token, position, label) in enumerate(
            zip(block["input_ids"], block["position_ids"], block["labels"], strict=True)
        ):
            assert label == (-100 if position == 0 else token)
            assert position in (0, block["position_ids"][place - 1] + 1)
    starts = sum(place == 0 for block in blocks for place in block["position_ids"])
    assert starts >= len(ROWS)
    assert (starts == len(ROWS)) == (max_length == 50)


@pytest.mark.parametrize("make", [tokenized.llama, tokenized.gpt2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_and_losses_are_those_of_each_document_alone(tmp_path, make, attention, batch_size):
    model, tokenizer = make().eval(), tokenized.tokenizer()
    model.set_attn_implementation(attention)
    built = task(tmp_path, max_length=24)  # the last document is alone in a second block
    built.equip(model)
    score = built.score(model, tokenizer, batch_size=batch_size)
    losses, each = [], []
    for row in ROWS:
        ids = [2, *tokenizer(row["text"])["input_ids"], 2]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        own = [-logits[i, token].item() for i, token in enumerate(ids[1:])]
        losses += own
        each.append(torch.tensor(own).mean().neg().exp().item())
    dataset = built.train_dataset(tokenizer, "test")
    assert len(dataset) == 2
    assert score.metrics["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert [p.probability for p in score.predictions] == pytest.approx(each, rel=1e-4)
    with torch.no_grad():
        found = model(**built.collator(tokenizer, model)(list(dataset)))
    assert found.loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    joined = build_task(TextSpec(data=built.data, max_length=24)).score(model, tokenizer)
    assert abs(joined.metrics["nll"] - score.metrics["nll"]) > 1e-2


def bloom():
    return BloomForCausalLM(BloomConfig(vocab_size=tokenized.SIZE, hidden_size=16, n_layer=1, n_head=2))


def rwkv():
    return RwkvForCausalLM(
        RwkvConfig(vocab_size=tokenized.SIZE, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16)
    )


class Careless(type(tokenized.llama())):
    """Takes positions, and lets everything see what is before it."""

    def forward(self, input_ids=None, position_ids=None, **options):
        return super().forward(input_ids, attention_mask=torch.ones_like(input_ids), **options)


@pytest.mark.parametrize("make", [bloom, rwkv])
def test_models_without_positions_are_refused_by_name(tmp_path, make):
    name = type(model := make()).__name__
    with pytest.raises(
        ScaloraError,
        match=rf"documents is 'apart', but {name} takes no position_ids: set task\.documents: joined",
    ):
        task(tmp_path).equip(model)


def test_models_that_see_other_documents_are_refused(tmp_path):
    model = tokenized.llama()
    with pytest.raises(ScaloraError, match="but Careless lets documents see those before them: set"):
        task(tmp_path).equip(Careless(model.config))


def test_a_whole_run(tmp_path):
    recipe = workspace.lay(tmp_path)
    data = f"{{train: {tmp_path}/data.jsonl, test_size: 20, validation_size: 9, columns: {{id: id}}}}"
    own = f"task={{kind: text, documents: apart, max_length: 12, data: {data}}}"
    values = ["training.eval_strategy=steps", "training.eval_steps=8", "training.per_device_eval_batch_size=1"]
    found = train(load_recipe(recipe, [own, *values]))
    assert found.after.metrics["nll"] < found.before.metrics["nll"]
    (logged,) = [entry["eval_loss"] for entry in found.metrics["log"] if "eval_loss" in entry]
    assert logged == pytest.approx(found.metrics["validation"]["nll"], rel=0.1)  # a mean over blocks of other lengths
    resumed = [f"output={tmp_path}/again", own, *values]
    again = train(load_recipe(recipe, resumed))
    assert again.metrics["after"] == found.metrics["after"]
    for form in ("lora", "merged"):
        result = CliRunner().invoke(app, ["export", f"{tmp_path}/again", "--to", form])
        assert result.exit_code == 0, result.output
