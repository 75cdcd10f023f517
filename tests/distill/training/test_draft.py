"""Drafts as folders: shapes, saving and loading, faults named."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from synthetic import VOCAB, teacher_folder

from distill.training import checkpoint
from distill.training.draft_config import DraftConfig
from distill.training.drafts import llama
from distill.training.memory import check_memory, estimate_memory
from kernels.errors import UserError


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return teacher_folder(tmp_path / "teacher")


@pytest.fixture
def config(teacher: Path) -> DraftConfig:
    return DraftConfig.for_teacher(teacher, layers=2, hidden=128)


def provenance() -> dict[str, object]:
    return {"teacher": {"name": "synthetic", "hash": "0" * 64}, "complete": True}


def test_config_follows_the_teacher(teacher: Path, config: DraftConfig) -> None:
    assert (config.heads, config.kv_heads, config.head_dim, config.intermediate) == (2, 1, 64, 384)
    assert (config.vocab_size, config.rope_theta, config.eos) == (VOCAB, 10_000.0, 2)
    assert DraftConfig.from_json(config.to_json()) == config
    for hidden_size in range(64, 2048, 64):
        c = DraftConfig.for_teacher(teacher, 1, hidden_size)
        assert c.heads % c.kv_heads == 0
        assert c.intermediate % 64 == 0
    parameters = sum(w.size for w in llama.create(config, 0).values())
    assert parameters == config.parameters


@pytest.mark.parametrize(
    ("layers", "size", "message"), [(0, 64, "--layers 0"), (2, 100, "--hidden 100: must be a multiple of 64")]
)
def test_impossible_shapes_are_named(teacher: Path, layers: int, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DraftConfig.for_teacher(teacher, layers, size)


def test_too_deep_is_refused_with_figures(teacher: Path) -> None:
    deep = DraftConfig.for_teacher(teacher, 100_000, 576)
    assert estimate_memory(deep) > 16 * deep.parameters
    with pytest.raises(UserError, match=r"100000 layers x 576 .* needs about [\d,.]+ GB .* has [\d,.]+ GB"):
        check_memory(deep, 8, 512)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_stock_mlx_lm_loads_it(tmp_path: Path, teacher: Path, config: DraftConfig, bits: int | None) -> None:
    from mlx_lm import load

    weights = llama.create(config, 0)
    out = tmp_path / "draft"
    checkpoint.save(out, weights, config, teacher, provenance(), bits)
    stock, tokenizer = load(str(out))
    assert tokenizer.encode("w5 w7") == [5, 7]
    tokens = mx.array(np.random.default_rng(1).integers(VOCAB, size=(1, 20)))
    again = checkpoint.load(out)
    assert again.config == config
    assert again.provenance["teacher"]["name"] == "synthetic"
    stock.set_dtype(mx.float32)  # bfloat16 activations would hide small differences
    for computed in (again.weights, checkpoint.rounded(weights, config, bits)):
        hidden = llama.forward(config, computed, tokens, mx.ones((1, 20), dtype=mx.int32))
        ours = hidden @ llama.head_weight(config, computed).T
        assert np.allclose(np.array(ours), np.array(stock(tokens)), atol=1e-4)


@pytest.mark.parametrize("kept", [None, 100], ids=["whole", "trimmed"])
def test_decoding_computes_what_a_ternary_draft_learned(tmp_path: Path, small_teacher: Path, kept: int | None) -> None:
    """Its matrices in BitNet's packing; read back, they round to the same."""
    from decode.models.checkpoint import find_model

    config = DraftConfig.for_teacher(small_teacher, 2, 64, kept, ternary=True)
    d2t = None if kept is None else np.arange(5, 5 + kept, dtype=np.int32)
    weights = llama.create(config, 0)
    checkpoint.save(tmp_path / "d", weights, config, small_teacher, provenance(), d2t=d2t)
    assert json.loads((tmp_path / "d" / "config.json").read_text())["hidden_act"] == "relu2"
    again = checkpoint.load(tmp_path / "d")
    assert again.config == config
    draft = find_model(str(tmp_path / "d"), "--draft").load()
    tokens = np.random.default_rng(1).integers(1000, size=20)
    found = np.array(draft.step(tokens, draft.new_cache()).logits)
    for computed in (checkpoint.rounded(weights, config, None), again.weights):
        hidden = llama.forward(config, computed, mx.array(tokens[None]), mx.ones((1, 20), dtype=mx.int32))[0]
        head = llama.head_weight(config, computed, None if d2t is None else mx.array(d2t))
        ours = np.array(hidden @ head.T)
        # Decoding rounds keys and values to bfloat16, which tips the rounding of some activations over.
        assert np.abs(found - ours).max() < 0.1 * np.abs(ours).max()
        assert np.corrcoef(found.ravel(), ours.ravel())[0, 1] > 0.999


def test_save_replaces_drafts_and_nothing_else(tmp_path: Path, teacher: Path, config: DraftConfig) -> None:
    weights = llama.create(config, 0)
    out = tmp_path / "draft"
    checkpoint.save(out, weights, config, teacher, provenance())
    (out / "log.jsonl").write_text("kept\n")
    checkpoint.save(out, weights, config, teacher, provenance() | {"note": "second"})
    assert checkpoint.load(out).provenance["note"] == "second"
    assert (out / "log.jsonl").read_text() == "kept\n"
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.tex").write_text("important")
    with pytest.raises(UserError, match=r"holds chapter1\.tex"):
        checkpoint.save(foreign, weights, config, teacher, provenance())
    assert [p.name for p in foreign.iterdir()] == ["chapter1.tex"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["draft", "teacher", "thesis"]


def test_killed_while_files_take_their_places(
    tmp_path: Path, teacher: Path, config: DraftConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whatever instant: what is there is no draft or a whole one, and whoever comes next ends what was begun."""

    class Killed(BaseException):
        """What ends a process at once, as nothing catches it."""

    (teacher / "generation_config.json").write_text("{}")
    rename, delete = Path.replace, Path.unlink
    for instant in range(30):
        out = tmp_path / f"draft-{instant}"
        checkpoint.save(out, llama.create(config, 0), config, teacher, provenance() | {"note": "first"})
        (out / "NOTES.txt").write_text("mine")
        left = [instant]

        def counted(action: Any, path: Path, *others: Any, left: list[int] = left, **named: Any) -> Any:
            if not left[0]:
                raise Killed
            left[0] -= 1
            return action(path, *others, **named)

        # The next one has no generation_config.json, so that the old one's has to go.
        (teacher / "generation_config.json").rename(teacher / "away")
        killed = False
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", lambda *given: counted(rename, *given))
            patch.setattr(Path, "unlink", lambda *given, **named: counted(delete, *given, **named))
            try:
                checkpoint.save(out, llama.create(config, 1), config, teacher, provenance() | {"note": "second"})
            except Killed:
                killed = True
        (teacher / "away").rename(teacher / "generation_config.json")
        if (out / "config.json").exists():
            checkpoint.load(out)
        checkpoint.check_draft_folder(out)
        assert checkpoint.load(out).provenance["note"] == "second"
        names = {path.name for path in out.iterdir()}
        expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "draft.json"}
        assert names == expected | {"NOTES.txt"} and (out / "NOTES.txt").read_text() == "mine"
        if not killed:
            break
    assert 5 < instant < 29


def test_a_full_disk_is_named(tmp_path: Path, teacher: Path, config: DraftConfig) -> None:
    """A limit on file sizes stands in for it. The draft that was there stays."""
    out, hard = tmp_path / "draft", resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    checkpoint.save(out, llama.create(config, 0), config, teacher, provenance() | {"note": "first"})
    before = {path.name for path in out.iterdir()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(UserError, match=f"no room left in {out}"):
            checkpoint.save(out, llama.create(config, 1), config, teacher, provenance() | {"note": "second"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert {path.name for path in out.iterdir()} == before
    assert checkpoint.load(out).provenance["note"] == "first"


@pytest.mark.parametrize("name", [".", "..", "", "/", "../draft/."])
def test_the_current_folder_is_never_replaced(
    tmp_path: Path, teacher: Path, config: DraftConfig, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one that holds it, though it be an older draft's."""
    out = tmp_path / "draft"
    checkpoint.save(out, llama.create(config, 0), config, teacher, provenance())
    monkeypatch.chdir(out)
    with pytest.raises(UserError, match="is the current folder or holds it"):
        checkpoint.check_draft_folder(Path(name))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: not there"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read"),
        (lambda f: (f / "config.json").write_text('{"model_type": "bitnet"}'), "'bitnet', not 'llama'"),
        (lambda f: (f / "config.json").unlink(), "config.json: missing"),
        (lambda f: _cut(f / "model.safetensors"), "model.safetensors: differs"),
        (lambda f: (_cut(f / "model.safetensors"), (f / "draft.json").unlink()), "not a readable safetensors"),
        (lambda f: _edit(f, hidden_size=64), "config.json: differs|asks for"),
        (lambda f: (_edit(f, intermediate_size=64), (f / "draft.json").unlink()), "asks for"),
        *(
            (lambda f, files=files: _edit(f, "draft.json", files=files), r"draft\.json: is damaged \(`files`")
            for files in (None, "abc", ["x"])
        ),
        (lambda f: _edit(f, "draft.json", files={"../draft/gone": ""}), r"names a file outside its folder: '\.\./"),
    ],
)
def test_damaged_drafts_are_named(
    tmp_path: Path, teacher: Path, config: DraftConfig, damage: object, message: str
) -> None:
    out = tmp_path / "draft"
    checkpoint.save(out, llama.create(config, 0), config, teacher, provenance())
    damage(out)  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        checkpoint.load(out)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _edit(folder: Path, name: str = "config.json", **changes: object) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))
