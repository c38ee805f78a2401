"""What starts at random in a classification model is known, and what must not is refused by name."""

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertModel,
    XLNetConfig,
    XLNetModel,
)

from helpers import tokenized
from scalora.common.errors import ScaloraError
from scalora.methods import MethodSpec, build_method
from scalora.models.base_print import backbone_fingerprint
from scalora.models.heads import find_heads
from scalora.models.load import load_model
from scalora.models.origin import origin

SIZES = {
    "vocab_size": tokenized.SIZE, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2,
}  # fmt: skip
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
BART = {f"{part}_{size}": n for part in ("encoder", "decoder") for size, n in
        (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
MADE = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "deberta": lambda: DebertaV2Model(DebertaV2Config(**SIZES, pooler_hidden_size=16)),
    "bart": lambda: BartModel(BartConfig(vocab_size=tokenized.SIZE, d_model=16, **BART, **IDS)),
    "xlnet": lambda: XLNetModel(XLNetConfig(vocab_size=tokenized.SIZE, d_model=16, n_layer=2, n_head=2, d_inner=32)),
    "modernbert": lambda: ModernBertModel(
        ModernBertConfig(**SIZES, pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)
    ),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(vocab_size=tokenized.SIZE, dim=16, hidden_dim=32, n_layers=2, n_heads=2)
    ),
}
POOLERS = {
    "bert": ["classifier", "bert.pooler.dense"],
    "deberta": ["classifier", "pooler.dense"],
    "bart": ["classification_head.dense", "classification_head.out_proj"],
    "xlnet": ["sequence_summary.summary", "logits_proj"],
    "modernbert": ["classifier", "head.dense", "head.norm"],
    "distilbert": ["pre_classifier", "classifier"],
}


def save(folder, model, tokenizer=True):
    model.save_pretrained(folder)
    tokenized.tokenizer().save_pretrained(folder)
    return str(folder)


def load(folder, **options):
    return load_model(
        folder, head="sequence-classification", **{"num_labels": 2, "class_names": ["no", "yes"], **options}
    )[0]


@pytest.mark.parametrize("method", ["lora", "full", "mora", "dora", "peft:LOHA"])
@pytest.mark.parametrize("kind", MADE)
def test_whatever_starts_at_random_is_trained_and_saved(tmp_path, kind, method):
    model = load(save(tmp_path / "base", MADE[kind]()))
    assert [name for name, _ in find_heads(model, "sequence-classification")] == POOLERS[kind]
    again = load(str(tmp_path / "base"))
    random = {n for n, p in again.named_parameters() if not torch.equal(p, dict(model.named_parameters())[n])}
    assert random <= origin(model).random  # biases start at zero
    assert random
    assert backbone_fingerprint(model) == backbone_fingerprint(again)

    adapted = build_method(MethodSpec(name=method, rank=2)).adapt(model, "sequence-classification")
    trained = {n: p for n, p in adapted.model.named_parameters() if p.requires_grad}
    for name in origin(model).random:
        owner, _, kind_of = name.rpartition(".")
        own = [p for n, p in trained.items() if f".{owner}." in f".{n}" and n.endswith(kind_of)]
        assert own, name
        own[0].data += 1
    with torch.no_grad():
        expected = adapted.model.eval()(input_ids=torch.tensor([[4, 5, 2]])).logits
    lines = adapted.save(tmp_path / "saved")
    if method == "mora":  # only scalora loads it
        import scalora

        found = scalora.load(tmp_path / "saved")
    else:
        names = {}
        exec("\n".join(lines), names)
        found = names["model"]
    with torch.no_grad():
        torch.testing.assert_close(found(input_ids=torch.tensor([[4, 5, 2]])).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_pooler_that_the_checkpoint_holds_is_no_head(tmp_path):
    model = load(save(tmp_path, tokenized.bert()))
    assert [name for name, _ in find_heads(model, "sequence-classification")] == ["classifier"]
    assert not origin(model).random


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden_size": 32}, "bert.* of .* is .*, but .* is wanted.*config.*hidden_size"),
        ({"intermediate_size": 64}, "intermediate.*is 32, but 64 is wanted.*intermediate_size"),
        ({"num_hidden_layers": 4}, r"does not hold bert\.encoder\.layer\.2.*num_hidden_layers"),
        ({"max_position_embeddings": 256}, "position_embeddings.*max_position_embeddings"),
        ({"vocab_size": 1000}, "word_embeddings.*vocab_size"),
    ],
)
def test_values_that_change_shapes_are_refused(tmp_path, config, words):
    with pytest.raises(ScaloraError, match=words):
        load(save(tmp_path, tokenized.bert()), config=config)


def test_a_checkpoint_without_a_part_of_its_backbone_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save(tmp_path, tokenized.bert())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ScaloraError, match=r"does not hold bert\.encoder\.layer\.1\.output\.dense\.weight.*checkpoint"):
        load(folder)


def test_another_number_of_labels_is_only_a_new_last_layer(tmp_path):
    model = load(save(tmp_path / "base", tokenized.bert(3)))
    assert origin(model).random == {"classifier.weight", "classifier.bias"}
    adapted = build_method(MethodSpec(name="lora", rank=2)).adapt(model, "sequence-classification")
    names = {}
    exec("\n".join(adapted.save(tmp_path / "adapter")), names)  # plain transformers would refuse the base
    assert names["model"].config.num_labels == 2


def _checkpoint(folder, **options):
    return save(folder, BertForSequenceClassification(BertConfig(**SIZES, **options)))


def test_the_tasks_classes_replace_the_checkpoints(tmp_path):
    stale = {"id2label": {0: "pos", 1: "neg"}, "label2id": {"pos": 0, "neg": 1}}
    model = load(_checkpoint(tmp_path / "base", **stale), class_names=["neg", "pos"])
    assert model.config.id2label == {0: "neg", 1: "pos"}
    assert model.config.label2id == {"neg": 0, "pos": 1}
    assert load(str(tmp_path / "base"), class_names=None).config.id2label == stale["id2label"]
    model.save_pretrained(tmp_path / "whole")
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert whole.config.id2label == {0: "neg", 1: "pos"}
    names = {}
    adapted = build_method(MethodSpec(name="lora", rank=2)).adapt(model, "sequence-classification")
    exec("\n".join(adapted.save(tmp_path / "adapter")), names)
    assert names["model"].config.id2label == {0: "neg", 1: "pos"}


@pytest.mark.parametrize("stale", ["regression", "multi_label_classification", "single_label_classification"])
@pytest.mark.parametrize("class_names", [[], ["a", "b"]])
def test_the_task_decides_the_loss(tmp_path, stale, class_names):
    labels = len(class_names) or 1
    folder = _checkpoint(tmp_path, num_labels=2, problem_type=stale)
    model = load(folder, num_labels=labels, class_names=class_names).eval()
    ids = torch.tensor([[4, 5], [6, 7]])
    targets = torch.tensor([1, 0]) if class_names else torch.tensor([0.5, -1.0])
    out = model(input_ids=ids, labels=targets)
    wanted = torch.nn.functional.cross_entropy(out.logits, targets) if class_names else (
        (out.logits[:, 0] - targets).square().mean()
    )  # fmt: skip
    torch.testing.assert_close(out.loss, wanted)


@pytest.mark.parametrize("name", ["num_labels", "id2label", "problem_type"])
def test_the_head_is_not_a_matter_of_config(tmp_path, name):
    with pytest.raises(ScaloraError, match=f"config: {name} follows from the task"):
        load(save(tmp_path, tokenized.bert()), config={name: 3})
