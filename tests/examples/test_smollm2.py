# SPDX-License-Identifier: Apache-2.0
"""The conversion from GGUF, on a small llama model that this file writes the way llama.cpp's converter does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

from safetensors.torch import load_file  # noqa: E402
from smollm2 import convert  # noqa: E402

HEADS, KV_HEADS, HEAD_DIM, LAYERS, MLP = 4, 2, 16, 2, 96
HIDDEN = HEADS * HEAD_DIM
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefgh0123456789", "Ġ", "ab", "abc"]
MERGES = ["a b", "ab c"]


def as_llama_cpp_stores(weight: np.ndarray, heads: int) -> np.ndarray:
    """convert_hf_to_gguf.py's permute: the two rotary halves of a head become even and odd rows."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def model() -> dict[str, np.ndarray]:
    """The float model, with transformers' names."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    tensors = {"model.embed_tokens.weight": normal(len(TOKENS), HIDDEN), "model.norm.weight": normal(HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": normal(HIDDEN),
            f"{prefix}.self_attn.q_proj.weight": normal(HIDDEN, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": normal(HIDDEN, HIDDEN),
            f"{prefix}.post_attention_layernorm.weight": normal(HIDDEN),
            f"{prefix}.mlp.gate_proj.weight": normal(MLP, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": normal(MLP, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": normal(HIDDEN, MLP),
        }
    return tensors


@pytest.fixture(scope="module")
def gguf_file(model: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_vocab_size(len(TOKENS))
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, weight in model.items():
        if "q_proj" in name:
            weight = as_llama_cpp_stores(weight, HEADS)
        if "k_proj" in name:
            weight = as_llama_cpp_stores(weight, KV_HEADS)
        short = names.get_name(name, try_suffixes=(".weight",))
        if weight.ndim == 1:
            writer.add_tensor(short, weight)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(short, gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def folder(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("converted")
    convert(gguf_file, target)
    return target


def test_every_weight_comes_back_under_its_name(folder: Path, model: dict[str, np.ndarray]) -> None:
    converted = load_file(folder / "model.safetensors")
    assert set(converted) == set(model)
    for name, weight in model.items():
        assert converted[name].dtype == torch.bfloat16
        # 8 bits per block of 32, then bfloat16.
        torch.testing.assert_close(converted[name].float(), torch.from_numpy(weight), rtol=2**-8, atol=0.03, msg=name)


def test_the_configuration_speaks_both_spellings(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100000.0
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] is True
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (HEADS, KV_HEADS, 16)


def test_transformers_computes_with_it(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.rope_parameters["rope_theta"] == 100000.0
    logits = model(torch.tensor([[1, 3, 4]])).logits
    assert logits.shape == (1, 3, len(TOKENS))
    assert torch.isfinite(logits.float()).all()


def test_the_tokenizer_is_the_ggufs(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer.tokenize("abc ab12<|im_end|>")
    assert tokens == ["abc", "Ġ", "ab", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("abc ab12")) == "abc ab12"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False) == "abc"


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="mamba is not llama"):
        convert(tmp_path / "other.gguf", tmp_path)
