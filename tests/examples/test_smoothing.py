# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from modelslim_writer import write_modelslim  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from smoothing import calibration_text, smooth  # noqa: E402

SOURCE = Path(__file__).resolve().parents[1] / "fixtures" / "source-tiny-qwen3"
WEIGHTS = "quant_model_weights-00001-of-00001.safetensors"
TEXT = "The quick brown fox jumps over the lazy dog. " * 8


@pytest.fixture(scope="module")
def spiky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a few channels of its norms and of up_proj and v_proj far above the rest."""
    folder = tmp_path_factory.mktemp("spiky") / "model"
    shutil.copytree(SOURCE, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("layernorm.weight", "up_proj.weight", "v_proj.weight")):
            tensor[3::50] *= 60
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def logits(folder: Path, edit: object = None) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    if edit is not None:
        for name, parameter in model.named_parameters():
            parameter.data = edit(name, parameter.data)
    ids = torch.tensor([[(7 * i) % 500 for i in range(64)]])
    with torch.no_grad():
        return model(ids).logits


def test_the_bfloat16_model_gives_the_same_bits(spiky: Path) -> None:
    smoothing = smooth(spiky, text=TEXT)
    changed = {name for name, factor in smoothing.factors.items() if (factor != 1).any()}
    assert len(changed) == 2 * (7 + 2)  # every Linear of two layers, and the two norms of each
    assert torch.equal(logits(spiky, smoothing), logits(spiky))


def test_factors_are_powers_of_two_and_leave_the_rest_alone(spiky: Path) -> None:
    smoothing = smooth(spiky, text=TEXT)
    for name, factor in smoothing.factors.items():
        assert torch.equal(torch.frexp(factor).mantissa, torch.full_like(factor, 0.5)), name
    head = torch.randn(4, 4)
    assert smoothing("lm_head.weight", head) is head


def test_outliers_move_into_the_weights_and_only_where_that_helps(spiky: Path) -> None:
    read = "model.layers.0.self_attn.q_proj.weight"
    columns = smooth(spiky, text=TEXT).factors[read].flatten()
    assert columns[3::50].median() >= 8 * columns.median()
    # Everything into the weights is worse than nothing: their rows then hold the outliers.
    untouched = smooth(spiky, alphas=[3.0], text=TEXT).factors[read]
    assert (untouched == 1).all()


def test_quantization_loses_less(spiky: Path, tmp_path: Path) -> None:
    """The error of a layer whose activations are rounded to 8 bits per token, with and without smoothing."""
    random = torch.Generator().manual_seed(0)
    name = "model.layers.0.self_attn.q_proj.weight"
    norm = load_file(spiky / "model.safetensors")["model.layers.0.input_layernorm.weight"].float()
    exact = load_file(spiky / "model.safetensors")[name].float()
    normed = torch.randn(256, len(norm), generator=random)
    errors = []
    for folder, edit in (("plain", None), ("smooth", smooth(spiky, text=TEXT))):
        written = load_file(write_modelslim(spiky, tmp_path / folder, edit=edit) / WEIGHTS)
        x = normed * written["model.layers.0.input_layernorm.weight"].float()
        scale = x.abs().amax(dim=1, keepdim=True) / 127
        x = (x / scale).round() * scale
        out = x @ (written[name].float() * written[f"{name}_scale"]).T
        expected = (normed * norm) @ exact.T
        errors.append(((out - expected).norm() / expected.norm()).item())
    assert errors[1] < errors[0] / 2


def test_biases_of_what_is_divided_are_divided(tmp_path: Path) -> None:
    """A qwen2: q, k and v have a bias, and v's rows are divided."""
    config = transformers.Qwen2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
    torch.nn.init.normal_(model.model.layers[0].self_attn.v_proj.bias)
    model.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SOURCE / file, tmp_path / file)
    smoothing = smooth(tmp_path, text=TEXT)
    assert "model.layers.0.self_attn.v_proj.bias" in smoothing.factors
    assert "model.layers.0.self_attn.q_proj.bias" not in smoothing.factors
    assert torch.equal(logits(tmp_path, smoothing), logits(tmp_path))


def test_a_model_of_unknown_build_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    with pytest.raises(ValueError, match="not gemma2"):
        smooth(tmp_path)


def test_calibration_and_measurement_use_different_text() -> None:
    import perplexity

    measured = perplexity.default_text()
    paragraphs = calibration_text().split("\n\n")
    assert len(paragraphs) > 1000
    assert not [paragraph for paragraph in paragraphs if paragraph in measured]
