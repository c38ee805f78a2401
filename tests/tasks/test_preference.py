"""Preferences: DPO's loss beside TRL's, a reference that nothing moves, forms of rows, and whole runs."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import Trainer, TrainingArguments

import scalora
from helpers import chats, tokenized, whole_runs
from scalora.common.errors import ScaloraError
from scalora.common.quiet import quiet
from scalora.models.load import load_model
from scalora.runs.recipe import load_recipe
from scalora.runs.training import train
from scalora.tasks import build_task
from scalora.tasks.pairs import answer_logprobs, dpo_loss
from scalora.tasks.preference import PreferenceSpec

SIDES = (("input", "labels"), ("rejected", "rejected_labels"))
LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def rows(count=60):
    words = ["cat", "dog", "sky", "mat", "red"]
    return [
        {
            "prompt": f"the {words[i % 5]} is {'abcdefgh'[i % 8]} {'no ' * (i % 3)}",
            "chosen": f" {words[i % 5]} yes",
            "rejected": f" {words[(i + 1) % 5]}",
            "id": i,
        }
        for i in range(count)
    ]


def task(folder, content, data=None, **fields):
    path = tokenized.write_jsonl(folder / "rows.jsonl", content)
    data = {"train": path, "test": path, "columns": {"id": "id"}, **(data or {})}
    return build_task(PreferenceSpec(data=data, **fields))


def measured(built, model, tokenizer, split="test"):
    """The dataset of a split, with what the untouched model thinks of it; the model learns from pairs."""
    dataset = built.train_dataset(tokenizer, split)
    built.refer(model, tokenizer, {split: dataset}, 8, None)
    built.equip(model)
    return dataset


def moved(model):
    """With adapters that do something."""
    torch.manual_seed(8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_log_probabilities_and_the_loss_by_hand(tmp_path):
    """One pair, its probabilities token by token, and the loss in Python's own arithmetic."""
    built, model, tokenizer = task(tmp_path, rows(1), beta=0.5), tokenized.llama().eval(), tokenized.tokenizer()
    (example,) = measured(built, model, tokenizer)
    sums = []
    for ids, labels in (
        (example["input_ids"], example["labels"]),
        (example["rejected_ids"], example["rejected_labels"]),
    ):
        assert ids[-1] == tokenizer.eos_token_id
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        sums.append(sum(logprobs[i, token].item() for i, token in enumerate(labels[1:]) if token != -100))
    assert tokenizer.decode([each for each in example["labels"] if each != -100]) == "cat yes <eos>"
    assert example["reference"] == pytest.approx(sums, rel=1e-5)
    other = torch.tensor([[sums[0] - 0.7, sums[1] + 0.4]])
    margin = 0.5 * (0.7 + 0.4)
    found = dpo_loss(torch.tensor(sums[:1]), torch.tensor(sums[1:]), other, 0.5)
    assert found.item() == pytest.approx(math.log(1 + math.exp(-margin)), rel=1e-6)


def test_the_loss_and_its_gradient_are_trls(tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    built, tokenizer = task(tmp_path, rows(6), beta=0.3), tokenized.tokenizer()
    base = tokenized.llama()
    dataset = measured(built, base, tokenizer)
    ours = moved(get_peft_model(base, LoraConfig(**LORA)))
    loss = ours(**built.collator(tokenizer)([dataset[i] for i in range(6)])).loss
    loss.backward()

    config = DPOConfig(str(tmp_path), beta=0.3, report_to="none", use_cpu=True, bf16=False)
    texts = Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows(6)])
    trainer = DPOTrainer(
        tokenized.llama(), args=config, train_dataset=texts, processing_class=tokenizer, peft_config=LoraConfig(**LORA)
    )
    theirs_by_name = dict(trainer.model.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            theirs_by_name[name].copy_(parameter)
    own = [-100]
    batch = DataCollatorForPreference(tokenizer.pad_token_id)(
        [
            {
                "prompt_ids": [i for i, label in zip(e["input_ids"], e["labels"], strict=True) if label in own],
                "chosen_ids": [label for label in e["labels"] if label not in own],
                "rejected_ids": [label for label in e["rejected_labels"] if label not in own],
            }
            for e in dataset
        ]
    )
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert abs(loss.item() - math.log(2)) > 1e-2
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs_by_name[name].grad, rtol=1e-4, atol=1e-6)


def test_events_leave_the_reference_as_it_was(tmp_path):
    """After events the model with its adapter switched off is, to the bit, the base that was measured."""
    built, base, tokenizer = task(tmp_path, rows(16)), tokenized.llama(), tokenized.tokenizer()
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        untouched = base(input_ids=ids).logits
    dataset = measured(built, base, tokenizer)
    model = get_peft_model(base, LoraConfig(**LORA))
    callback = scalora.ScaLoraCallback(scalora.ScaLoraConfig(interval=2))
    options = {"max_steps": 6, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
    arguments = TrainingArguments(str(tmp_path), remove_unused_columns=False, disable_tqdm=True, **options)
    Trainer(
        model, arguments, train_dataset=dataset, data_collator=built.collator(tokenizer), callbacks=[callback]
    ).train()
    assert len(callback.handle.stats) == 3
    score = built.score(model, tokenizer, batch_size=8)
    assert score.metrics["margin"] > 0
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, untouched)
        off = built.score(model, tokenizer, batch_size=8)
    assert off.metrics == {"reward_accuracy": 0, "margin": 0, "loss": pytest.approx(math.log(2))}


def test_gradient_accumulation_scales_the_mean_over_pairs(tmp_path):
    updates = []
    for rows_at_once, times in ((4, 1), (2, 2)):
        built, base, tokenizer = task(tmp_path, rows(4)), tokenized.llama(), tokenized.tokenizer()
        dataset = measured(built, base, tokenizer)
        torch.manual_seed(0)
        model = moved(get_peft_model(base, LoraConfig(**LORA)))
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, learning_rate=0.1, optim="sgd", report_to="none", use_cpu=True,
            per_device_train_batch_size=rows_at_once, gradient_accumulation_steps=times, save_strategy="no",
            remove_unused_columns=False, disable_tqdm=True, max_grad_norm=0.0,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=dataset, data_collator=built.collator(tokenizer)).train()
        updates.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    for one, other in zip(*updates, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


ASKED = [{"role": "user", "content": "hello"}]
GOOD, BAD = ([{"role": "assistant", "content": text}] for text in ("yes world", "no"))
FORMS = {
    "prompt as messages": {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    "whole conversations": {"chosen": ASKED + GOOD, "rejected": ASKED + BAD},
    "a prompt beside whole conversations": {"prompt": "hello", "chosen": ASKED + GOOD, "rejected": ASKED + BAD},
    "a text and messages": {"prompt": "hello", "chosen": GOOD, "rejected": BAD},
}


@pytest.mark.parametrize("form", FORMS)
def test_messages_are_written_by_the_chat_template(tmp_path, form):
    tokenizer = chats.tokenizer()
    (example,) = task(tmp_path, [FORMS[form]], {"columns": {}}).train_dataset(tokenizer, "test")
    asked = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    for ids, labels, text in (("input_ids", "labels", "yes world"), ("rejected_ids", "rejected_labels", "no")):
        assert tokenizer.decode(example[ids]) == f"{asked}{text}<|im_end|>\n"
        assert tokenizer.decode([label for label in example[labels] if label != -100]) == f"{text}<|im_end|>\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": " dog yes"}, "chosen and rejected say the same in .*line 2, row 2"),
        ({"chosen": "  "}, "task.chosen: the text is '  ' in .*row 2"),
        ({"chosen": 5}, "task.chosen: 5 is not a text or a list of messages in"),
        ({"prompt": None}, "task.prompt: there is no column 'prompt' in .*row 2"),
        ({"chosen": ASKED, "rejected": ASKED + BAD}, "task.chosen: no answer is the assistant's alone in"),
    ],
)
def test_rows_that_cannot_be_read(tmp_path, change, message):
    content = rows(10)
    content[1] |= change
    with pytest.raises(ScaloraError, match=message):
        _ = task(tmp_path, content).splits
    assert len(task(tmp_path, content, {"max_bad_rows": 1}).rows("test")) == 9


def test_a_prompt_that_is_asked_for_is_a_column(tmp_path):
    """Though whole conversations need none: what no row has is a mistake."""
    content = [{"id": 1, "ask": "a", "chosen": ASKED + GOOD, "rejected": ASKED + BAD}] * 3
    for fields in ({"prompt": "asks"}, {"data": {"columns": {"id": "id", "prompt": "asks"}}}):
        with pytest.raises(
            ScaloraError, match=r"no column 'asks' in .*; it has id, ask, chosen, rejected — did you mean"
        ):
            _ = task(tmp_path, content, **fields).splits
    assert len(task(tmp_path, content).rows("test")) == 3


def test_a_score_needs_a_reference(tmp_path):
    with pytest.raises(ScaloraError, match="the base model has not been measured"):
        task(tmp_path, rows(4)).score(tokenized.llama(), tokenized.tokenizer())


def test_sums_are_over_labels_alone():
    logits, labels = torch.randn(2, 4, 7), torch.tensor([[-100, -100, 3, 5], [-100, 2, -100, -100]])
    logprobs = functional.log_softmax(logits, -1)
    wanted = [logprobs[0, 1, 3] + logprobs[0, 2, 5], logprobs[1, 0, 2]]
    torch.testing.assert_close(answer_logprobs(logits, labels), torch.stack(wanted))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    quiet()
    folder = tmp_path_factory.mktemp("pairs")
    tokenized.llama().save_pretrained(folder / "model")
    tokenized.tokenizer().save_pretrained(folder / "model")
    tokenized.write_jsonl(folder / "preferences.jsonl", rows())
    return whole_runs.documented("preference", folder, task={"beta": 1.0})


INPUTS = {"input_ids": torch.tensor([[4, 5, 6, 7]])}


def test_a_whole_run(recipe, tmp_path):
    run = whole_runs.check_run(recipe, INPUTS, tmp_path, "loss", "reward_accuracy")
    assert run.before.metrics == {"reward_accuracy": 0, "margin": 0, "loss": pytest.approx(math.log(2))}
    assert run.after.metrics["margin"] > 0


def test_with_other_methods(recipe, tmp_path):
    whole_runs.check_other_methods(recipe, INPUTS, tmp_path)
    asking = ("lora-ga", "{name: alpha-lora, options: {batch: 4}}")  # the model itself for a loss
    for number, method in enumerate(asking):
        train(load_recipe(recipe, [f"method={method}", f"output={tmp_path / 'asking'}-{number}"]), ranks=False)


def test_a_base_that_is_written_to_does_not_move_the_reference(recipe, tmp_path):
    method = "method={name: scalora-i, rank: 2, options: {interval: 2, accumulate: base}}"
    own = load_recipe(recipe, [method, f"output={tmp_path / 'run'}"])
    run = train(own)
    built = build_task(own.task)
    base, tokenizer = load_model(own.model, head="causal-lm")
    measured(built, base, tokenizer)
    found = built.score(scalora.load(run.folder), tokenizer).metrics
    assert found == pytest.approx(run.after.metrics, rel=1e-4)
    assert run.after.metrics["margin"] > 0


def test_mistakes_get_one_line(recipe):
    assert "no column 'good' in" in whole_runs.refused(recipe, "task.chosen=good")
    assert "did you mean 'rejected'?" in whole_runs.refused(recipe, "task.rejectd=x")
    assert "task.beta is 0" in whole_runs.refused(recipe, "task.beta=0")
    assert "no column 'ask' in" in whole_runs.refused(recipe, "task.prompt=ask")
