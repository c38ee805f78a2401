"""What a folder holds, told from its files: the same numbers as PEFT's own, and figures equal to dense ones."""

import json
import subprocess
import sys

import pytest
import torch

from helpers import models
from scalora import ScaLoraConfig, ScaloraError, attach
from scalora.engine.plain_lora import joined_factors
from scalora.runs.export.artefact import find_artefact, read_factors
from scalora.runs.export.layer_figures import by_kind, layer_figures


@pytest.fixture
def saved(tmp_path):
    """A model with trained and accumulated columns, ranks and alphas by pattern, and the folder it is saved in."""
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 32, "up_proj": 1}}
    model = models.lora("llama", use_rslora=True, **patterns)
    optimizer = torch.optim.AdamW(models.trainable(model), lr=1e-2)
    handle = attach(model, optimizer, ScaLoraConfig(interval=1))
    models.train(model, optimizer, "llama", 4)
    model.save_pretrained(tmp_path / "saved")
    return handle, tmp_path / "saved"


def test_factors_and_scales_are_those_that_peft_computes_with(saved):
    handle, folder = saved
    artefact = find_artefact(folder)
    assert (artefact.kind, artefact.in_parts, artefact.moved) == ("lora", True, False)
    factors = read_factors(artefact)
    assert len(factors) == len(handle.layers)
    for layer in handle.layers:
        P, Q = joined_factors(layer)
        parts = [part for part in factors[layer.name.removeprefix("base_model.model.")] if part is not None]
        assert torch.equal(torch.cat([part.P for part in parts], 1), P)
        assert torch.equal(torch.cat([part.Q for part in parts], 1), Q)


def test_figures_equal_dense_ones(saved):
    handle, folder = saved
    figures = {name: layer_figures(name, *parts) for name, parts in read_factors(find_artefact(folder)).items()}
    for layer in handle.layers:
        found = figures[layer.name.removeprefix("base_model.model.")]
        trained = layer.scale * layer.A.detach().double() @ layer.Bt.detach().double()
        held = [part.double() for part in layer.accumulated.columns()]
        accumulated = layer.scale * held[0] @ held[1]
        sigma = torch.linalg.svdvals(trained + accumulated)
        share = sigma / sigma.sum()
        assert found.shape == tuple(trained.shape)
        assert found.norm == pytest.approx(float((trained + accumulated).norm()), rel=1e-5)
        assert found.trained == pytest.approx(float(trained.norm()), rel=1e-5)
        assert found.accumulated == pytest.approx(float(accumulated.norm()), rel=1e-5)
        both = float(trained.norm() ** 2 + accumulated.norm() ** 2)
        assert found.accumulated_share == pytest.approx(float(accumulated.norm()) ** 2 / both, rel=1e-5)
        assert found.effective_rank == pytest.approx(float(torch.special.entr(share).sum().exp()), rel=1e-4)
        assert found.columns == layer.rank * 4  # three of four events moved something
        assert found.rank == int((sigma > max(found.shape) * 1.1920929e-07 * sigma[0]).sum())
    kinds = by_kind(list(figures.values()))
    assert {kind: of["layers"] for kind, of in kinds.items()} == {
        "q_proj": 2, "v_proj": 2, "up_proj": 2, "down_proj": 2
    }  # fmt: skip
    assert kinds["v_proj"]["columns"] == 8


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_variants_of_lora_are_not_taken_for_plain(tmp_path, options):
    models.lora("llama", **options).save_pretrained(tmp_path / "variant")
    assert find_artefact(tmp_path / "variant").kind == "peft"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"peft_type": "LORA"}'])
def test_damaged_settings_are_an_error_that_names_the_file(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ScaloraError, match=r"adapter_config\.json|adapter_model\.safetensors is missing"):
        find_artefact(tmp_path)


def test_inspecting_loads_neither_peft_nor_transformers(saved):
    code = (
        "import sys; from scalora.__main__ import main; sys.argv = ['scalora', 'inspect', sys.argv[1], '--json']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([m for m in ('peft', 'transformers') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(saved[1])], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert len(json.loads(done.stdout)["layers"]) == 8
