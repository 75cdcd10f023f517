"""BitNet checkpoints of other makes than Microsoft's compute what their weights mean, or are refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import small_bitnets as small
from conftest import Command
from small_bitnets import DIVIDED, ONLINE, PACKED, Json

from decode.models.checkpoint import find_model, find_teacher
from decode.tokenizer import Tokenizer
from kernels import UserError

IDS = np.random.default_rng(0).integers(0, small.VOCAB, 12).tolist()


def logits(folder: Path) -> np.ndarray:
    model = find_teacher(str(folder)).load()
    return np.array(model.step(IDS, model.new_cache()).logits)


def test_master_weights_are_made_ternary(tmp_path: Path) -> None:
    expected = logits(small.microsoft(tmp_path / "packed"))
    assert expected.std() > 0.1
    np.testing.assert_array_equal(logits(small.master(tmp_path / "master")), expected)


@pytest.mark.slow
def test_1bitllm(tmp_path: Path) -> None:
    expected = logits(small.microsoft(tmp_path / "packed", hidden_act="silu"))
    folder = small.one_bit_llm(tmp_path / "1bitLLM")
    np.testing.assert_array_equal(logits(folder), expected)
    assert not np.array_equal(expected, logits(small.microsoft(tmp_path / "relu2")))
    # Its tokenizer names code of its own, which is neither run nor asked for.
    ours, theirs = Tokenizer(folder), Tokenizer(small.TEACHER)
    assert ours.encode_text("The sky is  blue.") == theirs.encode_text("The sky is  blue.")


@pytest.mark.slow
@pytest.mark.parametrize("skipped", [["lm_head"], None])
def test_falcon_divides(tmp_path: Path, skipped: list[str] | None) -> None:
    llama = {"model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": False}
    parts = small.packed(small.masters(), "power"), small.others(None, head=True)
    expected = logits(small.write(tmp_path / "times", small.config(**llama), *parts))
    quantization = DIVIDED | {"modules_to_not_convert": skipped}
    falcon = small.falcon(tmp_path / "falcon", quantization_config=quantization)
    np.testing.assert_array_equal(logits(falcon), expected)
    # Without the flag, a head of its own says that the embeddings are not tied.
    untold = small.config(**llama | {"tie_word_embeddings": None})
    np.testing.assert_array_equal(logits(small.write(tmp_path / "untold", untold, *parts)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
def test_converted_by_mlx_lm(tmp_path: Path, quantized: bool) -> None:
    from mlx_lm import convert

    original = small.microsoft(tmp_path / "packed")
    converted = tmp_path / "mlx"
    convert(str(original), str(converted), quantize=quantized, q_bits=4, q_group_size=32)
    assert (
        "quant_method" not in json.loads((converted / "config.json").read_text())["quantization_config"]
        or not quantized
    )
    expected, found = logits(original), logits(converted)
    if not quantized:
        np.testing.assert_array_equal(found, expected)
        return
    # Only the embedding was quantised: the same as a checkpoint with the rounded embedding.
    arrays = small.packed(small.masters()) | small.others()
    codes = mx.quantize(arrays["model.embed_tokens.weight"], group_size=32, bits=4)
    rounded = mx.dequantize(*codes, group_size=32, bits=4).astype(mx.bfloat16)
    same = small.write(tmp_path / "rounded", small.config(), arrays | {"model.embed_tokens.weight": rounded})
    np.testing.assert_array_equal(found, logits(same))
    assert not np.array_equal(found, expected)


@pytest.mark.slow
def test_llama_converted_by_mlx_lm(tmp_path: Path) -> None:
    from mlx_lm import convert

    original = small.falcon(tmp_path / "falcon")
    convert(str(original), str(tmp_path / "mlx"))
    np.testing.assert_array_equal(logits(tmp_path / "mlx"), logits(original))


def test_llama_that_mlx_lm_has_quantised_has_lost_its_scales_meaning(tmp_path: Path) -> None:
    from mlx_lm import convert

    convert(str(small.falcon(tmp_path / "falcon")), str(tmp_path / "mlx"), quantize=True, q_bits=4, q_group_size=32)
    with pytest.raises(UserError, match="a 'llama' quantised by mlx-lm, which keeps nothing of how"):
        find_teacher(str(tmp_path / "mlx"))


def test_unpacked_ternary_weights(tmp_path: Path) -> None:
    """As transformers reads `autobitlinear` too: the values -1, 0 and 1 as floats, beside their scale."""
    packed = small.packed(small.masters())
    values = {
        f"{name}.weight": mx.array(small.ternary(w)[0]).astype(mx.bfloat16) for name, w in small.masters().items()
    }
    folder = small.write(tmp_path / "unpacked", small.config(), packed | values, small.others())
    np.testing.assert_array_equal(logits(folder), logits(small.microsoft(tmp_path / "packed")))


def test_rope_as_transformers_5_writes_it(tmp_path: Path) -> None:
    base = {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    expected = logits(small.microsoft(tmp_path / "old", rope_theta=500.0))
    np.testing.assert_array_equal(logits(small.microsoft(tmp_path / "new", **base)), expected)
    assert not np.array_equal(expected, logits(small.microsoft(tmp_path / "other")))


QUANTIZED: dict[str, tuple[Json, str]] = {
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "(quant_method is 'gptq', not 'bitnet')"),
    "awq": ({"quantization_config": {"quant_method": "awq"}}, "(quant_method is 'awq', not 'bitnet')"),
    "bitsandbytes": ({"quantization_config": {"quant_method": "bitsandbytes"}}, "(quant_method is 'bitsandbytes'"),
    "float": ({"quantization_config": None}, "(quant_method is None, not 'bitnet')"),
    "model type": ({"model_type": "qwen3"}, "model_type 'qwen3' is not supported"),
    "attention bias": ({"attention_bias": True}, "attention_bias: layers with a bias are not supported"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias: layers with a bias are not supported"),
    "linear class": ({"quantization_config": PACKED | {"linear_class": "b1"}}, "linear_class 'b1' is not supported"),
    "mode": ({"quantization_config": PACKED | {"quantization_mode": "mixed"}}, "quantization_mode 'mixed' is not"),
    "inner norms": (
        {"quantization_config": PACKED | {"use_rms_norm": True}},
        "use_rms_norm: linear layers with a norm",
    ),
    "partly float": (
        {"quantization_config": ONLINE | {"modules_to_not_convert": ["model.layers.0.mlp.up_proj"]}},
        "modules_to_not_convert names 'model.layers.0.mlp.up_proj'",
    ),
    "other bits": (
        {"quantization_config": None, "architectures": ["BitnetForCausalLM"], "weight_bits": 2, "input_bits": 8},
        "weight_bits and input_bits are 2 and 8",
    ),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_configs_refused_by_name(tmp_path: Path, name: str) -> None:
    values, complaint = QUANTIZED[name]
    folder = small.write(tmp_path / "m", small.config(**values), small.others())
    with pytest.raises(UserError, match=re.escape(f"{folder}/config.json: ")) as caught:
        find_teacher(str(folder))
    assert complaint in str(caught.value)


Q = "model.layers.1.self_attn.q_proj"
WEIGHTS: dict[str, tuple[Json, dict[str, mx.array], str]] = {
    "other values": ({}, {f"{Q}.weight": mx.full((96, 96), 0.5)}, f"{Q}.weight: holds other values than -1, 0 and 1"),
    "not finite": (
        {"quantization_config": ONLINE},
        {f"{Q}.weight": mx.full((96, 96), float("nan"))},
        f"{Q}.weight: holds a value that is not finite",
    ),
    "scale a row": ({}, {f"{Q}.weight_scale": mx.ones((96,))}, f"{Q}.weight_scale: 96 scales"),
    "integers": ({}, {f"{Q}.weight": mx.zeros((96, 96), mx.int32)}, f"{Q}.weight: mlx.core.int32 is not how"),
    "odd rows": ({}, {f"{Q}.weight": mx.zeros((98, 96))}, f"{Q}.weight: 98 outputs are not a multiple of 4"),
    "ternary head": (
        {"tie_word_embeddings": False},
        {"lm_head.weight": mx.zeros((4096, 96), mx.uint8), "lm_head.weight_scale": mx.ones((1,))},
        "lm_head: a ternary layer other than those of attention and feed-forward",
    ),
    "heads of one number": (
        {"num_attention_heads": 96, "num_key_value_heads": 32},
        {},
        "the size of a head is 1; RoPE turns pairs, so it has to be even",
    ),
    "heads of no size": ({"num_attention_heads": 5}, {}, "hidden_size is 96, not a multiple of num_attention_heads"),
    "heads that do not fit": ({"num_attention_heads": 6}, {}, "Expected shape"),
    "activation": ({"hidden_act": "gelu"}, {}, "hidden_act 'gelu' is not supported (relu2 and silu are)"),
    "rope": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
        {},
        "this kind of RoPE is not supported: YarnRoPE",
    ),
    "sliding window": (
        {"model_type": "llama", "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 64},
        {},
        "layers with a sliding window are not supported",
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_refused_by_name(tmp_path: Path, name: str) -> None:
    values, replaced, complaint = WEIGHTS[name]
    norms = None if values.get("model_type") == "llama" else ("attn_sub_norm", "ffn_sub_norm")
    parts = small.packed(small.masters()), small.others(norms), replaced
    folder = small.write(tmp_path / "m", small.config(**values), *parts)
    with pytest.raises(UserError, match=re.escape(str(folder))) as caught:
        find_teacher(str(folder)).load()
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_scale(tmp_path: Path) -> None:
    arrays = small.packed(small.masters())
    del arrays[f"{Q}.weight_scale"]
    folder = small.write(tmp_path / "m", small.config(), arrays, small.others())
    with pytest.raises(UserError, match=re.escape(f"{folder}: {Q}.weight_scale: missing")):
        find_teacher(str(folder)).load()


def test_files_that_are_not_read(tmp_path: Path) -> None:
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    (gguf / "ggml-model-i2_s.gguf").write_bytes(b"GGUF")
    for name in (gguf, gguf / "ggml-model-i2_s.gguf"):
        with pytest.raises(UserError, match=rf"--teacher {re.escape(str(name))}: GGUF files \(such as i2_s\)"):
            find_teacher(str(name))
    pickled = small.microsoft(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pytorch_model\.bin is there, a pickle, which is never loaded"):
        find_teacher(str(pickled))
    (pickled / "pytorch_model.bin").rename(pickled / "model.safetensors")
    (pickled / "tokenizer.json").rename(pickled / "tokenizer.model")
    with pytest.raises(UserError, match=r"tokenizer\.json is missing \(tokenizer\.model alone is not read\)"):
        find_teacher(str(pickled))


@pytest.mark.parametrize("family", ["master", "1bitLLM"])
def test_against_transformers(tmp_path: Path, family: str) -> None:
    """Master weights as transformers makes them ternary, and 1bitLLM's layers as its BitNet with SiLU has them."""
    torch = pytest.importorskip("torch", reason="needs the extra `parity`")
    pytest.importorskip("accelerate", reason="needs the extra `parity`")
    from transformers import AutoModelForCausalLM

    weights = small.floats(small.masters(), mx.float32)  # so neither side rounds its scales
    values: Json = {"quantization_config": ONLINE, "hidden_act": "silu" if family == "1bitLLM" else "relu2"}
    ours = theirs = small.write(tmp_path / "hf", small.config(**values), weights, small.others())
    if family == "1bitLLM":
        values |= {"quantization_config": None, "model_type": "llama", "architectures": ["BitnetForCausalLM"]}
        parts = weights, small.others(("inner_attn_ln", "ffn_layernorm"))
        ours = small.write(tmp_path / "1bitLLM", small.config(**values), *parts)
    model = torch.nn.Module.float(AutoModelForCausalLM.from_pretrained(theirs))
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    found = logits(ours)
    # Sums in another order now and then round an activation to the next of its 256 steps.
    assert np.abs(found - expected).max() < 0.05 * expected.std()


@pytest.mark.slow
def test_commands_run_on_one(tmp_path: Path, inside: Command) -> None:
    """Collecting from a teacher of another make, and decoding with a draft for it."""
    from distill.training import checkpoint
    from distill.training.draft_config import DraftConfig
    from distill.training.drafts import llama

    teacher, data = small.one_bit_llm(tmp_path / "teacher"), tmp_path / "data"
    (tmp_path / "text.txt").write_text((small.TEACHER / "README.md").read_text() * 20)
    collect = ["--source", tmp_path / "text.txt", "--tokens", 2048, "--seq-len", 64, "--out", data, "--json", "-"]
    done = inside("distill", "collect", "--teacher", teacher, *collect, "--quiet")
    assert done.code == 0, done.err
    assert json.loads(done.out)["tokens"] == 2048
    shape = DraftConfig.for_teacher(teacher, layers=1, hidden=64)
    checkpoint.save(tmp_path / "draft", llama.create(shape, seed=0), shape, teacher, {"complete": True})
    assert "auto_map" not in json.loads((tmp_path / "draft" / "tokenizer_config.json").read_text())
    spec = ["--draft", tmp_path / "draft", "--prompt", "The sky", "--max-tokens", 12, "--compare", "--json", "-"]
    done = inside("decode", "spec", "--teacher", teacher, *spec)
    assert done.code == 0, done.err
    assert json.loads(done.out)["identical"] is True


def test_a_teacher_of_another_make_drafts_for_itself(tmp_path: Path) -> None:
    from decode.models.checkpoint import check_same_tokenizer

    folder = str(small.falcon(tmp_path / "falcon"))
    teacher, draft = find_teacher(folder), find_model(folder, "--draft")
    check_same_tokenizer(teacher, draft)
    a: Any = draft.load()
    np.testing.assert_array_equal(np.array(a.step(IDS, a.new_cache()).logits), logits(Path(folder)))
