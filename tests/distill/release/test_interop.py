"""Drafts in other programs, and other programs' drafts here: mlx-lm, transformers, names on the Hub."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import small_bitnets as small
from conftest import ROOT, TEACHER, Command, Result, environment
from synthetic import VOCAB, teacher_folder

from decode.models.checkpoint import find_model
from distill.release.card import assisted_generation
from distill.training import checkpoint
from distill.training.draft_config import DraftConfig
from distill.training.drafts import llama


def random_draft(folder: Path, teacher: Path, layers: int, seed: int) -> Path:
    config = DraftConfig.for_teacher(teacher, layers=layers, hidden=64)
    checkpoint.save(folder, llama.create(config, seed=seed), config, teacher, {"complete": True})
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A Llama to decode with and a draft for it, which agrees with it by chance only."""
    teacher = teacher_folder(tmp_path / "teacher")
    return random_draft(tmp_path / "target", teacher, 2, 1), random_draft(tmp_path / "draft", teacher, 1, 2)


def test_speculative_decoding_of_mlx_lm(pair: tuple[Path, Path]) -> None:
    from mlx_lm import load
    from mlx_lm.generate import generate_step, speculative_generate_step

    target, small_one = (load(str(folder))[0] for folder in pair)
    for model in (target, small_one):
        model.set_dtype(mx.float32)  # bfloat16 has ties, which one row and several break differently
    prompt = mx.array([5, 7, 11])
    plain = [int(token) for token, _ in generate_step(prompt, target, max_tokens=24)]
    for helper in (small_one, target):
        steps = speculative_generate_step(prompt, target, helper, max_tokens=24, num_draft_tokens=3)
        tokens, from_draft = zip(*((int(token), drafted) for token, _, drafted in steps), strict=True)
        assert list(tokens) == plain
        # As a draft of its own, the target has every token that was drafted accepted: three of four.
        assert helper is not target or sum(from_draft) == 18


def test_generate_of_mlx_lm(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlx_lm.generate import main

    target, draft_folder = map(str, pair)
    options = ["--prompt", "w5 w7 w11", "--max-tokens", "8", "--ignore-chat-template"]
    words = ["mlx_lm.generate", "--model", target, "--draft-model", draft_folder, *options]
    monkeypatch.setattr(sys, "argv", words)
    main()
    assert "Generation: 8 tokens" in capsys.readouterr().out


def test_assistant_of_transformers(pair: tuple[Path, Path]) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra `parity`")
    from transformers import AutoModelForCausalLM

    target, assistant = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in pair)
    ids = np.random.default_rng(0).integers(3, VOCAB, 16).tolist()
    for model, folder in ((target, pair[0]), (assistant, pair[1])):
        ours = find_model(str(folder), "--draft").load()
        found = np.array(ours.step(ids, ours.new_cache()).logits)
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    prompt = torch.tensor([ids])
    options = {"do_sample": False, "max_new_tokens": 24, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    plain = target.generate(prompt, **options)
    assert plain.shape[1] > len(ids) + 4
    assert torch.equal(target.generate(prompt, assistant_model=assistant, **options), plain)


def test_the_program_for_transformers(tmp_path: Path, weak_draft: Path) -> None:
    """As docs/checkpoints.md has it, on the embedded teacher and a draft where its reader has one."""
    program = assisted_generation("checkpoints/bitnet-smol-116m", "runs/first/draft")
    documented = (ROOT / "docs" / "checkpoints.md").read_text()
    assert textwrap.indent(program, "    ", lambda line: bool(line.strip())) in documented
    pytest.importorskip("torch", reason="needs the extra `parity`")
    pytest.importorskip("accelerate", reason="needs the extra `parity`")
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "draft").symlink_to(weak_draft)
    (tmp_path / "checkpoints").symlink_to(TEACHER.parent)
    program += (
        "\nplain = teacher.generate(**prompt, do_sample=False, max_new_tokens=64)\nprint(torch.equal(plain, output))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program.replace("=64", "=12")],
        env=environment(TORCHDYNAMO_DISABLE="1"),  # compiling would take most of the time
        capture_output=True, text=True, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *text, same = done.stdout.splitlines()
    assert len("".join(text)) > 20 and same == "True"


@pytest.mark.slow
def test_server_of_mlx_lm(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    target, draft_folder = map(str, pair)
    options = ["--model", target, "--draft-model", draft_folder, "--port", str(port), "--num-draft-tokens", "2"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlx_lm", "server", *options],
            stdout=log,
            stderr=log,
            env=environment(),
            cwd=tmp_path,
        )
    asked = json.dumps({"prompt": "w5 w7 w11", "max_tokens": 8}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", asked, {"Content-Type": "application/json"}
    )
    try:
        until = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    found = json.load(answer)
                break
            except (ConnectionError, urllib.error.URLError):
                assert server.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()
                time.sleep(0.1)
    finally:
        server.kill()
        server.wait()
    assert found["usage"]["completion_tokens"] == 8, found


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_drafts_that_mlx_lm_has_quantised(
    tmp_path: Path, small_teacher: Path, weak_draft: Path, inside: Command, bits: int
) -> None:
    from mlx_lm import convert

    quantized = tmp_path / "quantized"
    convert(str(weak_draft), str(quantized), quantize=True, q_bits=bits, q_group_size=32)
    assert json.loads((quantized / "config.json").read_text())["quantization"]["bits"] == bits
    ours, before = (find_model(str(folder), "--draft").load() for folder in (quantized, weak_draft))
    ids = list(range(9000, 9012))
    found, expected = (np.array(model.step(ids, model.new_cache()).logits) for model in (ours, before))
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > (0.95 if bits == 4 else 0.999)
    assert not np.array_equal(found, expected)
    spec = ["--teacher", small_teacher, "--draft", quantized, "--prompt", "The sky", "--max-tokens", 12]
    done = inside("decode", "spec", *spec, "--compare", "--json", "-", "--quiet")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["identical"] is True and result["drafted"] > 0


def cached(cache: Path, repo: str, folder: Path, revision: str, commit: str) -> None:
    """A folder as the Hub's client would have downloaded it at a revision."""
    repo_folder = cache / f"models--{repo.replace('/', '--')}"
    (repo_folder / "refs").mkdir(parents=True, exist_ok=True)
    (repo_folder / "refs" / revision).write_text(commit)
    (repo_folder / "snapshots").mkdir(exist_ok=True)
    (repo_folder / "snapshots" / commit).symlink_to(folder)


@pytest.mark.slow
def test_revisions_of_names_on_the_hub(tmp_path: Path, small_teacher: Path, weak_draft: Path, command: Command) -> None:
    cache = tmp_path / "cache"
    cached(cache, "someone/teacher", small_teacher, "v1.0", "1" * 40)
    cached(cache, "someone/draft", weak_draft, "main", "2" * 40)
    broken = small.microsoft(tmp_path / "other", hidden_act="gelu")
    cached(cache, "someone/draft", broken, "v9", "3" * 40)

    def run(teacher: str, draft_name: str) -> Result:
        spec = ["--prompt", "The sky", "--max-tokens", 4, "--json", "-", "--quiet"]
        return command("decode", "spec", "--teacher", teacher, "--draft", draft_name, *spec, HF_HUB_CACHE=str(cache))

    done = run("someone/teacher@v1.0", "someone/draft")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert (result["teacher"], result["draft"]) == ("someone/teacher@v1.0", "someone/draft")
    # Another revision is another model, and one that is not there is named.
    run("someone/teacher@v1.0", "someone/draft@v9").refused("decode", "3" * 40, "hidden_act 'gelu'")
    run("someone/teacher@v2.0", "someone/draft").refused("decode", "--teacher someone/teacher@v2.0: ")
    run("someone/teacher@v1.0", "someone/draft@gone").refused("decode", "--draft someone/draft@gone: ")
