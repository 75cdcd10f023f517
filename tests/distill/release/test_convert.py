"""`distill convert`: the same logits from Microsoft's packing, and nothing lost on the way there."""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import small_bitnets as small
from conftest import TEACHER, Command, mounted
from safetensors import safe_open

from decode.models.checkpoint import find_teacher
from distill.data.manifest import DatasetSettings
from distill.provenance import origin, teacher_metadata
from distill.release.convert import convert
from kernels import UserError
from kernels.files import working_in

IDS = np.random.default_rng(0).integers(0, small.VOCAB, 12).tolist()


def logits(folder: Path) -> np.ndarray:
    model = find_teacher(str(folder)).load()
    return np.array(model.step(IDS, model.new_cache()).logits)


def converted_by_mlx_lm(folder: Path) -> Path:
    from mlx_lm import convert as mlx_convert

    original = small.microsoft(folder.with_name("before-mlx"))
    mlx_convert(str(original), str(folder), quantize=True, q_bits=4, q_group_size=32)
    return folder


def half_precision(folder: Path) -> Path:
    """1bitLLM's as float16."""
    norms = small.others(("inner_attn_ln", "ffn_layernorm"))
    weights = small.floats(small.masters(), mx.float16)
    description = json.loads((small.one_bit_llm(folder.with_name("for-config")) / "config.json").read_text())
    return small.write(folder, description, weights, {name: a.astype(mx.float16) for name, a in norms.items()})


def odd_scales(folder: Path) -> Path:
    """Scales to divide by whose inverse no narrower type than float32 holds."""
    small.falcon(folder)
    arrays = {name: array for path in folder.glob("*.safetensors") for name, array in mx.load(str(path)).items()}
    scales = {name: array * 1.37 for name, array in arrays.items() if name.endswith("weight_scale")}
    for path in folder.glob("model*"):
        path.unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), arrays | scales)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [small.microsoft, small.master, small.one_bit_llm, half_precision, small.falcon, odd_scales, converted_by_mlx_lm],
)
def test_the_same_logits_in_microsofts_packing(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    original = make(tmp_path / "original")
    read: list[int] = []
    teacher = find_teacher(str(original))
    total = sum(array.nbytes for array in teacher.arrays().values())
    result = convert(teacher, tmp_path / "converted", read.append)
    assert sum(read) == total

    np.testing.assert_array_equal(logits(tmp_path / "converted"), logits(original))
    description = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert description["quantization_config"] == small.PACKED
    assert not {"auto_map", "quantization", "weight_bits"} & description.keys()
    arrays = mx.load(str(tmp_path / "converted" / "model.safetensors"))
    assert isinstance(arrays, dict) and result.tensors == len(arrays)
    assert result.bytes == sum(array.nbytes for array in arrays.values())
    for i in range(small.LAYERS):
        for name, (n, k) in small.SHAPES.items():
            weight, scale = (arrays[f"model.layers.{i}.{name}.{part}"] for part in ("weight", "weight_scale"))
            assert (weight.dtype, weight.shape) == (mx.uint8, (n // 4, k))
            assert scale.shape == (1,)
    if make is small.microsoft:
        before = mx.load(str(original / "model.safetensors"))
        assert isinstance(before, dict) and before.keys() == arrays.keys()
        assert all(mx.array_equal(before[name], arrays[name]).item() for name in before)
    assert "auto_map" not in json.loads((tmp_path / "converted" / "tokenizer_config.json").read_text())
    assert find_teacher(str(tmp_path / "converted")).tokenizer_hash == teacher.tokenizer_hash


def test_large_ones_are_cut_into_files(tmp_path: Path) -> None:
    original = small.master(tmp_path / "original")
    result = convert(find_teacher(str(original)), tmp_path / "out", lambda _: None, shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) == result.files > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    weight_map = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    held = {}
    for name in files:
        with safe_open(tmp_path / "out" / name, "np") as file:
            held |= dict.fromkeys(file.keys(), name)
        # A tensor larger than a file's size has a file of its own.
        assert sum(v == name for v in held.values()) == 1 or (tmp_path / "out" / name).stat().st_size < 25_000
    assert weight_map == held
    np.testing.assert_array_equal(logits(tmp_path / "out"), logits(original))


def test_command(tmp_path: Path, inside: Command) -> None:
    original, out = small.one_bit_llm(tmp_path / "original"), tmp_path / "out"
    done = inside("distill", "convert", "--teacher", original, "--out", out, "--json", "-")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert (facts["teacher"], facts["out"], facts["family"], facts["files"]) == ("original", str(out), "1bitLLM", 1)
    assert "convert: 100%" in done.err and f"{out}: {facts['tensors']} tensors in 1 file" in done.err
    # Its own folder is replaced, any other is not.
    (out / "model.safetensors").write_bytes(b"")
    teacher = find_teacher(str(original))
    convert(teacher, out, lambda _: None)
    assert (out / "model.safetensors").stat().st_size > 1e6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original", "out"]
    other = small.master(tmp_path / "other")
    before = (out / "model.safetensors").read_bytes()
    refused = inside("distill", "convert", "--teacher", other, "--out", out)
    refused.refused("distill", f"--out {out}: holds the conversion of another model")
    assert (out / "model.safetensors").read_bytes() == before
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.tex").write_text("important")
    refused = inside("distill", "convert", "--teacher", original, "--out", foreign)
    refused.refused("distill", f"--out {foreign}: holds chapter1.tex")
    assert (foreign / "chapter1.tex").read_text() == "important"
    with pytest.raises(UserError, match="original: is the checkpoint that is read"):
        convert(teacher, original, lambda _: None)


def test_files_of_others_stay(tmp_path: Path, inside: Command) -> None:
    """In a conversion that is made again, through a link, with fewer files than before."""
    original, out, target = small.master(tmp_path / "original"), tmp_path / "link", tmp_path / "target"
    out.symlink_to("target")
    convert(find_teacher(str(original)), out, lambda _: None, shard_bytes=20_000)
    assert len(list(target.glob("model-*"))) > 2
    (target / "NOTES.txt").write_text("mine")
    options = ("convert", "--teacher", original, "--out", out, "-q")
    edited = target / "tokenizer_config.json"
    before = edited.read_bytes()
    edited.write_text("{}")
    inside("distill", *options).refused("distill", str(out / edited.name))
    assert edited.read_text() == "{}"
    edited.write_bytes(before)
    (target / "model-mine.safetensors").write_bytes(b"mine")  # would be read with the others
    inside("distill", *options).refused("distill", "model-mine.safetensors")
    (target / "model-mine.safetensors").unlink()
    with working_in(out):
        inside("distill", *options).refused("distill", str(out), "another process")
    assert inside("distill", *options).code == 0
    assert out.is_symlink() and (target / "NOTES.txt").read_text() == "mine"
    assert [path.name for path in target.glob("model*")] == ["model.safetensors"]
    np.testing.assert_array_equal(logits(target), logits(original))


def test_a_full_disk_is_named(tmp_path: Path, inside: Command) -> None:
    """And not the checkpoint that is read. A limit on file sizes stands in for it."""
    original, hard = small.master(tmp_path / "original"), resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        full = inside("distill", "convert", "--teacher", original, "--out", tmp_path / "out", "-q")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    full.refused("distill", f"no room left in {tmp_path / 'out'}")
    assert str(original) not in full.err and not (tmp_path / "out").exists()


def test_a_disk_without_room_is_found_before_the_work(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from decode.models.checkpoint import find_teacher
from distill.release.convert import convert
convert(find_teacher({str(TEACHER)!r}), Path(sys.argv[1], "out"), lambda count: print("work began"))
"""
    done = mounted(tmp_path, "4m", program)
    assert f"no room left in {tmp_path / 'out'}" in done.stderr and "work began" not in done.stdout


def test_where_it_comes_from_is_kept(tmp_path: Path) -> None:
    """A draft of a conversion has the licence and the name on the Hub of what was converted."""
    snapshot = tmp_path / "models--maker--masters" / "snapshots" / ("12" * 20)
    original = find_teacher(str(small.master(snapshot)))
    card = "---\nlicense: other\nlicense_name: our-terms\nlicense_link: https://example.org\n---\n"
    (snapshot / "README.md").write_text(card)
    known = {"repo": "maker/masters", "revision": "12" * 20, "license": "other", "license_name": "our-terms"}
    known |= {"license_link": "https://example.org"}
    assert origin(snapshot) == known
    convert(original, tmp_path / "out", lambda _: None)
    teacher = find_teacher(str(tmp_path / "out"))
    named = {"teacher": {"name": "out", "hash": teacher.weights_hash}, "tokenizer_hash": teacher.tokenizer_hash}
    facts = teacher_metadata(teacher.folder, DatasetSettings(named | {"vocab_size": small.VOCAB}))
    assert facts == {"name": "out", "hash": teacher.weights_hash, "converted_from": original.weights_hash} | known
    (tmp_path / "out" / "converted.json").write_text("{")
    assert origin(tmp_path / "out") == {}
    # A relative link leads into the repository, where that is known; else the file comes along.
    (snapshot / "README.md").write_text(card.replace("https://example.org", "./TERMS.md"))
    absolute = f"https://huggingface.co/maker/masters/blob/{'12' * 20}/TERMS.md"
    assert origin(snapshot)["license_link"] == absolute
    local = small.master(tmp_path / "local")
    (local / "README.md").write_text(card.replace("https://example.org", "./TERMS.md"))
    (local / "TERMS.md").write_text("the terms")
    convert(find_teacher(str(local)), tmp_path / "again", lambda _: None)
    assert (tmp_path / "again" / "TERMS.md").read_text() == "the terms"


@pytest.mark.slow
def test_what_cannot_be_converted_leaves_nothing(tmp_path: Path) -> None:
    def changed(name: str, replaced: dict[str, mx.array]) -> Path:
        return small.write(tmp_path / name, small.config(), small.packed(small.masters()), small.others() | replaced)

    name = "model.layers.0.mlp.up_proj.weight"
    cases = {
        "code": ({name: mx.full((small.FFN // 4, small.HIDDEN), 255, mx.uint8)}, f"{name}: holds the code 3"),
        "shape": ({name: mx.zeros((4, small.HIDDEN), mx.uint8)}, "up_proj"),
        "more": ({"model.extra.weight": mx.zeros((4,))}, "cannot be loaded"),
    }
    for case, (replaced, complaint) in cases.items():
        folder = changed(case, replaced)
        with pytest.raises(UserError, match=str(folder)) as caught:
            convert(find_teacher(str(folder)), tmp_path / "out", lambda _: None)
        assert complaint in str(caught.value) and ".tmp" not in str(caught.value)
    for name in ("tokenizer.json", "generation_config.json"):
        folder = small.microsoft(tmp_path / name)
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text("<!DOCTYPE html>")
        with pytest.raises(UserError, match=re.escape(f"{folder / name}: cannot be read")):
            convert(find_teacher(str(folder)), tmp_path / "out", lambda _: None)
        cases[name] = ({}, "")
    interrupted = small.microsoft(tmp_path / "interrupted")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(find_teacher(str(interrupted)), tmp_path / "out", interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*cases, "interrupted"])
