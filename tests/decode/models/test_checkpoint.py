"""Model folders that are damaged, incomplete or do not belong together are refused by name."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import small_bitnets as small
from conftest import TEACHER, changed_copy

from decode.models.checkpoint import check_same_tokenizer, find_model, find_teacher, token_table, tokenizer_hash
from kernels import UserError
from kernels.ops import TernaryWeight

Json = dict[str, Any]
PACKED = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}


def edited(name: str, change: Callable[[Json], None]) -> bytes:
    """A JSON file of the teacher's, changed."""
    content = json.loads((TEACHER / name).read_text())
    change(content)
    return json.dumps(content).encode()


def config(**values: Any) -> bytes:
    return edited("config.json", lambda content: content.update(values))


def weights(tmp_path: Path, change: Callable[[dict[str, mx.array]], None]) -> bytes:
    arrays = mx.load(str(TEACHER / "model.safetensors"))
    assert isinstance(arrays, dict)
    change(arrays)
    mx.save_safetensors(str(tmp_path / "changed.safetensors"), arrays, {"format": "mlx"})
    return (tmp_path / "changed.safetensors").read_bytes()


def test_the_embedded_teacher() -> None:
    teacher = find_teacher(None)
    assert teacher.folder == TEACHER and teacher.name == TEACHER.name
    assert len(teacher.weights_hash) == len(teacher.tokenizer_hash) == 64


def hash_of(tokenizer: Json, folder: Path) -> str:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return tokenizer_hash(folder)


@pytest.mark.slow
def test_hashes_tell_content_not_layout(tmp_path: Path) -> None:
    teacher = find_teacher(None)
    tokenizer = json.loads((TEACHER / "tokenizer.json").read_text())
    respelled = json.dumps(dict(reversed(tokenizer.items())), indent=3).encode()
    same = find_model(str(changed_copy(TEACHER, tmp_path / "same", tokenizer__json=respelled)), "--teacher")
    assert (same.tokenizer_hash, same.weights_hash) == (teacher.tokenizer_hash, teacher.weights_hash)
    tokenizer["post_processor"] = {"type": "ByteLevel"}
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    assert hash_of(tokenizer, tmp_path / "saved-again") == teacher.tokenizer_hash
    for change in (
        rename_token,
        swap_tokens,
        drop_token,
        swap_merges,
        lambda c: c["added_tokens"][2].update(special=0),
    ):
        changed = json.loads(json.dumps(tokenizer))
        change(changed)
        assert hash_of(changed, tmp_path / f"other-{change.__name__}") != teacher.tokenizer_hash
    data = bytearray((TEACHER / "model.safetensors").read_bytes())
    data[-1] ^= 1
    other = find_model(str(changed_copy(TEACHER, tmp_path / "other", model__safetensors=bytes(data))), "--teacher")
    assert other.weights_hash != teacher.weights_hash


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("model__safetensors", None, "model.safetensors: missing"),
        ("model__safetensors", b"", "model.safetensors: damaged or cut short"),
        ("model__safetensors", b"\xff" * 4096, "model.safetensors: damaged or cut short"),
        ("config__json", None, "config.json: missing"),
        ("config__json", b"{", "config.json: cannot be read"),
        ("config__json", b"[]", "config.json: is not a JSON object"),
        ("config__json", b"\xff{}", "config.json: cannot be read"),
        ("config__json", b"{}", "config.json: vocab_size is None"),
        ("tokenizer__json", None, "tokenizer.json is missing"),
        ("model__safetensors__index__json", b"{}", "index.json: has no weight_map"),
        ("model__safetensors__index__json", b'{"weight_map": {"a": "../x"}}', "index.json: names a file outside"),
        (
            "model__safetensors__index__json",
            b'{"weight_map": {"a": []}}',
            "index.json: is damaged ([] is no file's name)",
        ),
        ("model-old__safetensors", b"garbage", "model-old.safetensors: damaged or cut short"),
        (
            "model__safetensors__index__json",
            b'{"weight_map": {"a": "model-00002-of-2.safetensors"}}',
            "model-00002-of-2.safetensors: missing",
        ),
    ],
)
def test_incomplete_folders(tmp_path: Path, file: str, content: bytes | None, complaint: str) -> None:
    folder = changed_copy(TEACHER, tmp_path / "m", **{file: content})
    with pytest.raises(UserError, match=re.escape(str(folder))) as caught:
        find_teacher(str(folder))
    assert complaint in str(caught.value)


def test_a_folders_name_is_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own weights are loaded, be there another folder that a pattern of its name would find, or none."""
    mine, others = small.microsoft(tmp_path / "mine"), tmp_path / "others"
    small.write(others, small.config(), small.packed(small.masters(2)), small.others(seed=3))

    def logits(folder: Path) -> np.ndarray:
        model = find_teacher(str(folder)).load()
        return np.array(model.step([5], model.new_cache()).logits)

    expected = logits(mine)
    assert not np.array_equal(expected, logits(others))
    (tmp_path / "tmp[1]").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp[1]"))
    for name, found in (("m[1]", "m1"), ("q?", "qx"), ("a*", "ab"), ("p[!x]/m", "py/m"), ("alone[1]", None)):
        shutil.copytree(mine, tmp_path / name)
        if found is not None:
            shutil.copytree(others, tmp_path / found)
        np.testing.assert_array_equal(logits(tmp_path / name), expected)
    assert not list((tmp_path / "tmp[1]").iterdir())


def test_half_a_download(tmp_path: Path) -> None:
    whole = (TEACHER / "model.safetensors").read_bytes()
    for i, size in enumerate((len(whole) - 1, len(whole) // 2, 1000, 5)):
        folder = changed_copy(TEACHER, tmp_path / str(i), model__safetensors=whole[:size])
        with pytest.raises(UserError, match=r"model\.safetensors: damaged or cut short"):
            find_teacher(str(folder))


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"model_file": "evil.py"}, "asks for code of its own (model_file), which is never run"),
        ({"quantization_config": None}, "not a BitNet checkpoint"),
        ({"quantization_config": {"quant_method": "gptq"}}, "not a BitNet checkpoint"),
        ({"quantization_config": "bitnet"}, "not a BitNet checkpoint"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"max_position_embeddings": "a"}, "max_position_embeddings is 'a'"),
        ({"num_key_value_heads": -3}, "num_key_value_heads is -3"),
        ({"num_attention_heads": 5, "num_key_value_heads": 20}, "num_attention_heads is 5, not a multiple of"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": None}, "hidden_size is 576, not a multiple"),
        ({"head_dim": 63}, "the size of a head is 63"),
        ({"model_type": ["bitnet"]}, "model_type ['bitnet'] is not supported"),
        ({"quantization_config": PACKED | {"modules_to_not_convert": 3}}, "modules_to_not_convert is 3"),
    ],
)
def test_configs_refused(tmp_path: Path, values: Json, complaint: str) -> None:
    folder = changed_copy(TEACHER, tmp_path / "m", config__json=config(**values))
    with pytest.raises(UserError, match=re.escape(f"{folder}/config.json: {complaint}")):
        find_teacher(str(folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "no_such_model"},
        {"model_type": "gpt2"},
        {"num_hidden_layers": 13},
        {"num_hidden_layers": 11},
        {"hidden_size": 512},
        {"num_attention_heads": 7},
        {"rms_norm_eps": None},
        {"rope_theta": "a"},
        {"vocab_size": 5},
        {"intermediate_size": 3000},
    ],
)
def test_configs_that_do_not_fit_the_weights(tmp_path: Path, values: Json) -> None:
    folder = changed_copy(TEACHER, tmp_path / "m", config__json=config(**values))
    with pytest.raises(UserError, match=re.escape(str(folder))) as caught:
        find_teacher(str(folder)).load()
    assert "\n" not in str(caught.value)


def test_invalid_code(tmp_path: Path) -> None:
    name = "model.layers.3.mlp.up_proj.weight"

    def spoil(arrays: dict[str, mx.array]) -> None:
        packed = np.array(arrays[name])
        packed[5, 7] |= 0b00110000
        arrays[name] = mx.array(packed)

    folder = changed_copy(TEACHER, tmp_path / "m", model__safetensors=weights(tmp_path, spoil))
    with pytest.raises(UserError, match=re.escape(f"{folder}: {name}: holds the code 3")):
        find_teacher(str(folder)).load()


@pytest.mark.slow
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_invalid_scale(tmp_path: Path, value: float) -> None:
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    data = weights(tmp_path, lambda arrays: arrays.update({name: mx.full(arrays[name].shape, value)}))
    folder = changed_copy(TEACHER, tmp_path / "m", model__safetensors=data)
    with pytest.raises(UserError, match=re.escape(f"{name}: {value} is no positive number")):
        find_teacher(str(folder)).load()


@pytest.mark.slow
def test_missing_and_misshapen_weights(tmp_path: Path) -> None:
    name = "model.layers.7.mlp.down_proj.weight"
    for i, change in enumerate(
        (lambda arrays: arrays.pop(name), lambda arrays: arrays.update({name: arrays[name][:, :100]}))
    ):
        folder = changed_copy(TEACHER, tmp_path / f"m{i}", model__safetensors=weights(tmp_path, change))
        with pytest.raises(UserError, match=re.escape(str(folder))) as caught:
            find_teacher(str(folder)).load()
        assert "down_proj" in str(caught.value) or "parameters" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_divided_scales(tmp_path: Path) -> None:
    """`linear_class: bitlinear` divides by weight_scale: inverted scales then mean the same model."""
    quantization = {"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline"}

    def invert(arrays: dict[str, mx.array]) -> None:
        for name in [name for name in arrays if name.endswith("weight_scale")]:
            arrays[name] = 1 / arrays[name].astype(mx.float32)

    folder = changed_copy(
        TEACHER,
        tmp_path / "m",
        model__safetensors=weights(tmp_path, invert),
        config__json=config(quantization_config=quantization),
    )
    ours, theirs = (find_teacher(name).load() for name in (None, str(folder)))
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        for one, other in ((a.qkv, b.qkv), (a.o, b.o), (a.gate_up, b.gate_up), (a.down, b.down)):
            assert isinstance(one, TernaryWeight) and isinstance(other, TernaryWeight)
            np.testing.assert_allclose(np.array(one.scale), np.array(other.scale), rtol=1e-6)
            assert not np.allclose(np.array(one.scale), 1.0)


# --- tokenizers


def rename_token(content: Json) -> None:
    vocab = content["model"]["vocab"]
    text = next(text for text, number in vocab.items() if number == 9000)
    vocab[text + "x"] = vocab.pop(text)


def swap_tokens(content: Json) -> None:
    vocab = content["model"]["vocab"]
    a, b = (next(text for text, number in vocab.items() if number == wanted) for wanted in (9000, 9001))
    vocab[a], vocab[b] = vocab[b], vocab[a]


def swap_merges(content: Json) -> None:
    merges = content["model"]["merges"]
    merges[10], merges[11] = merges[11], merges[10]


def drop_token(content: Json) -> None:
    vocab = content["model"]["vocab"]
    del vocab[max(vocab, key=vocab.__getitem__)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (rename_token, "disagree on token 9000"),
        (swap_tokens, "disagree on token 9000"),
        (drop_token, "disagree in their vocabulary"),
        (lambda content: content["added_tokens"][2].update(content="<|end|>"), "disagree on token 2"),
        (lambda content: content["added_tokens"][2].update(special=False), "disagree on token 2"),
        (lambda content: content["model"].update(vocab=[]), "has no vocabulary"),
        (lambda content: content.update(model=[]), "has no vocabulary"),
        (lambda content: content["model"].update(vocab=[1]), "its vocabulary is damaged"),
        (lambda content: content["model"]["vocab"].update({"a": "b"}), "is damaged \\(the id of token 'a' is 'b'\\)"),
        (lambda content: content.update(added_tokens=[{}]), "added_tokens are damaged"),
    ],
)
def test_other_tokenizers(tmp_path: Path, change: Callable[[Json], None], complaint: str) -> None:
    folder = changed_copy(TEACHER, tmp_path / "draft", tokenizer__json=edited("tokenizer.json", change))
    draft = find_model(str(folder), "--draft")
    with pytest.raises(UserError, match=complaint) as caught:
        check_same_tokenizer(find_teacher(None), draft)
    assert str(folder) in str(caught.value)


def test_other_vocabulary_size(tmp_path: Path) -> None:
    draft = find_model(str(changed_copy(TEACHER, tmp_path / "d", config__json=config(vocab_size=16640))), "--draft")
    with pytest.raises(UserError, match="sizes 16640 and 16384"):
        check_same_tokenizer(find_teacher(None), draft)


def test_a_vocabulary_with_scores(tmp_path: Path) -> None:
    """As Unigram's are: their order decides the ids, and their scores what a text becomes."""

    def written(**model: Any) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        special = [{"id": 0, "content": "<unk>", "special": True}]
        content = {"added_tokens": special, "model": {"type": "Unigram", "unk_id": 0} | model}
        (folder / "tokenizer.json").write_text(json.dumps(content))
        return folder

    folder = written(vocab=[["<unk>", 0.0], ["a", -1.5], ["b", -2.0]])
    assert token_table(folder) == {0: ("<unk>", True), 1: ("a", False), 2: ("b", False)}
    assert tokenizer_hash(written(vocab=[["<unk>", 0.0], ["a", -1.5], ["b", -2.0]], unk_id=None)) == tokenizer_hash(
        folder
    )
    assert tokenizer_hash(written(vocab=[["<unk>", 0.0], ["a", -2.0], ["b", -2.0]])) != tokenizer_hash(folder)
    assert tokenizer_hash(written(vocab=[["<unk>", 0.0], ["b", -1.5], ["a", -2.0]])) != tokenizer_hash(folder)


def test_same_tokenizer_in_another_layout(tmp_path: Path) -> None:
    respelled = edited("tokenizer.json", lambda content: content.update(truncation=None))
    folder = changed_copy(TEACHER, tmp_path / "d", tokenizer__json=respelled)
    check_same_tokenizer(find_teacher(None), find_model(str(folder), "--draft"))


# --- names


def test_names_that_are_neither_folders_nor_on_the_hub(tmp_path: Path) -> None:
    for name in ("nowhere", "a/b/c", "./gone/away", "/gone/away", "~gone/away"):
        with pytest.raises(UserError, match=f"--teacher {re.escape(name)}: no such folder, and not a Hub name"):
            find_teacher(name)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match=f"--teacher {file}: not a folder"):
        find_teacher(str(file))
