"""Small BitNet checkpoints made up for tests, of every make, with the embedded teacher's tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from conftest import TEACHER

Json = dict[str, Any]

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 2, 96, 128, 3, 1, 16384
HEAD_DIM = HIDDEN // HEADS
PACKED = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
DIVIDED = {"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline"}
ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}


def config(**values: Any) -> Json:
    """A `bitnet` config.json with squared ReLU and tied embeddings; values replace, None removes."""
    content: Json = {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "hidden_act": "relu2",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 2048,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        "quantization_config": PACKED,
    } | values
    return {key: value for key, value in content.items() if value is not None}


def masters(seed: int = 0) -> dict[str, mx.array]:
    """Random float weights of every projection, bfloat16 [n, k]."""
    rng = np.random.default_rng(seed)
    return {
        f"model.layers.{i}.{name}": mx.array(rng.normal(0, 0.7, shape).astype(np.float32)).astype(mx.bfloat16)
        for i in range(LAYERS)
        for name, shape in SHAPES.items()
    }


def others(
    sub_norms: tuple[str, str] | None = ("attn_sub_norm", "ffn_sub_norm"), seed: int = 1, head: bool = False
) -> dict[str, mx.array]:
    """Embedding, norms and, if asked for, a head of its own; sub_norms: their names, None for none."""
    rng = np.random.default_rng(seed)

    def floats(*shape: int, mean: float = 0.0) -> mx.array:
        return mx.array(rng.normal(mean, 0.3, shape).astype(np.float32)).astype(mx.bfloat16)

    arrays = {"model.embed_tokens.weight": floats(VOCAB, HIDDEN), "model.norm.weight": floats(HIDDEN, mean=1)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        arrays[f"{layer}.input_layernorm.weight"] = floats(HIDDEN, mean=1)
        arrays[f"{layer}.post_attention_layernorm.weight"] = floats(HIDDEN, mean=1)
        if sub_norms:
            arrays[f"{layer}.self_attn.{sub_norms[0]}.weight"] = floats(HIDDEN, mean=1)
            arrays[f"{layer}.mlp.{sub_norms[1]}.weight"] = floats(FFN, mean=1)
    if head:
        arrays["lm_head.weight"] = floats(VOCAB, HIDDEN)
    return arrays


def ternary(master: mx.array) -> tuple[np.ndarray, np.float32]:
    """What a master weight stands for, by the published formula: int8 [n, k] and its scale before rounding."""
    weight = np.array(master.astype(mx.float32))
    scale = np.abs(weight.astype(np.float64)).mean()
    return np.sign(weight).astype(np.int8) * (np.abs(weight) > scale / 2), np.float32(scale)


def packed(weights: dict[str, mx.array], scales: str = "bfloat16") -> dict[str, mx.array]:
    """Projections in Microsoft's packing.

    scales: "bfloat16"; "power", rounded to powers of two, whose inverse is exact; or "inverse", one by those.
    """
    arrays = {}
    for name, master in weights.items():
        values, scale = ternary(master)
        rows = len(values) // 4
        codes = (values + 1).astype(np.uint8)
        arrays[f"{name}.weight"] = mx.array(sum(codes[i * rows : (i + 1) * rows] << 2 * i for i in range(4)))
        power = 2.0 ** round(np.log2(scale))
        value = {"bfloat16": float(scale), "power": power, "inverse": 1 / power}[scales]
        arrays[f"{name}.weight_scale"] = mx.array([value]).astype(mx.bfloat16)
    return arrays


def floats(weights: dict[str, mx.array], dtype: mx.Dtype = mx.bfloat16) -> dict[str, mx.array]:
    return {f"{name}.weight": master.astype(dtype) for name, master in weights.items()}


def write(folder: Path, description: Json, *parts: dict[str, mx.array], files: int = 1) -> Path:
    """A checkpoint's folder, its weights in as many files as asked for."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(description))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(TEACHER / name, folder / name)
    arrays = {name: array for part in parts for name, array in part.items()}
    names = sorted(arrays, reverse=True)  # so that a matrix and its scale may lie in different files
    weight_map = {}
    for i in range(files):
        file = "model.safetensors" if files == 1 else f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        mx.save_safetensors(str(folder / file), {name: arrays[name] for name in names[i::files]}, {"format": "pt"})
        weight_map |= dict.fromkeys(names[i::files], file)
    if files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def microsoft(folder: Path, **values: Any) -> Path:
    """In the packing of Microsoft's, the one that every other make is compared with."""
    return write(folder, config(**values), packed(masters()), others())


def master(folder: Path) -> Path:
    """Float master weights, made ternary on load, as in Microsoft's -bf16."""
    return write(folder, config(quantization_config=ONLINE), floats(masters()), others(), files=2)


def one_bit_llm(folder: Path, **values: Any) -> Path:
    """As 1bitLLM publishes them: a `llama` by its model_type, with sub-norms, SiLU and code of its own."""
    description = config(
        architectures=["BitnetForCausalLM"],
        model_type="llama",
        hidden_act="silu",
        quantization_config=None,
        weight_bits=1,
        input_bits=8,
        auto_map={"AutoModelForCausalLM": "modeling_bitnet.BitnetForCausalLM"},
    )
    write(folder, description | values, floats(masters()), others(("inner_attn_ln", "ffn_layernorm")))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    remote = {
        "tokenizer_class": "BitnetTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_bitnet.BitnetTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | remote))
    for name in ("tokenization_bitnet.py", "modeling_bitnet.py"):
        (folder / name).write_text("raise SystemExit('code of a checkpoint was run')\n")
    return folder


def falcon(folder: Path, **values: Any) -> Path:
    """A `llama` without sub-norms, with a head of its own, whose outputs are divided by the scales."""
    quantization = DIVIDED | {"modules_to_not_convert": ["lm_head"]}
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    description = config(**llama, tie_word_embeddings=False, quantization_config=quantization)
    return write(folder, description | values, packed(masters(), "inverse"), others(None, head=True), files=3)
