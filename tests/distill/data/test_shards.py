"""Shards: what is written is read, a kill loses nothing, and damage is named."""

import hashlib
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from conftest import unsealed
from safetensors.numpy import load, save

from distill.data.codec import Block
from distill.data.inspection import inspect_dataset, table, verify
from distill.data.manifest import DatasetSettings, Omission, ScoredFrom
from distill.data.reply_dataset import Example, ReplyWriter
from distill.data.shards import Dataset, ShardWriter, newest_dataset
from distill.training.run import train
from distill.training.settings import TrainSettings
from kernels.errors import UserError
from kernels.files import sha256

ROOT = Path(__file__).parents[3]
BIG = 128_256


def make_settings(
    vocab_size: int = 300,
    k: int = 8,
    seq_len: int = 64,
    temperatures: tuple[float, ...] = (1.0,),
    teacher: str = "h",
    **more: Any,
) -> DatasetSettings:
    return DatasetSettings(
        {
            "teacher": {"name": "t", "hash": teacher},
            "tokenizer_hash": "x",
            "vocab_size": vocab_size,
            "k": k,
            "seq_len": seq_len,
            "temperatures": temperatures,
            **more,
        }
    )


def make_block(settings: DatasetSettings, rows: int = 4, seed: int = 0) -> Block:
    """A block as a collector would make it: true log-sum-exps, documents, padding at the end of a row."""
    rng = np.random.default_rng(seed)
    n, k, vocab_size = settings.seq_len, settings.k, settings.vocab_size
    logits = -np.sort(-rng.normal(0, 3, (rows, n, k)), axis=-1)
    tail = rng.gamma(1, 2, (rows, n, 1))
    lse = np.log(np.exp(logits).sum(-1, keepdims=True) + tail)
    starts = rng.random((rows, n)) < 0.05
    starts[:, :1] = True
    segments = np.cumsum(starts, axis=1).astype(np.uint8)
    segments[rows // 2 : rows // 2 + 1, n - n // 4 :] = 0
    step = 1 + rng.integers(0, max(1, vocab_size // k - 1), (rows, n, 1))
    ids = (rng.integers(0, vocab_size, (rows, n, 1)) + step * np.arange(k)) % vocab_size
    return Block(
        tokens=rng.integers(0, vocab_size, (rows, n)).astype(np.int32),
        loss_mask=(rng.random((rows, n)) < 0.7) & (segments > 0),
        segments=segments,
        top_ids=ids.astype(np.int32),
        top_logprobs=(logits - lse).astype(np.float32),
        lse=np.concatenate([lse / t for t in settings.temperatures], axis=-1).astype(np.float32),
    )


def collect(folder: Path, shards: int, settings: DatasetSettings | None = None) -> None:
    settings = settings or make_settings()
    with ShardWriter.open(folder, settings) as writer:
        for index in writer.missing(shards):
            writer.write(make_block(settings, seed=index), index)
        writer.finish()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def edit_manifest(folder: Path, change: Any) -> None:
    """Changes what a manifest says, as one that has no hash of its own."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("sha256", None)
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def reseal(folder: Path, index: int, change: Any) -> None:
    """Changes a shard's tensors and makes the manifest agree, as a faulty collector would have."""
    path = folder / f"shard-{index:05d}.safetensors"
    tensors = {name: array.copy() for name, array in load(path.read_bytes()).items()}
    change(tensors)
    data = save(tensors)
    path.write_bytes(data)
    facts = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    edit_manifest(folder, lambda manifest: manifest["shards"][index].update(facts))


# --- round trip


@pytest.mark.parametrize(("vocab_size", "k"), [(300, 8), (65_536, 4), (BIG, 32), (2, 1)])
def test_round_trip(tmp_path: Path, vocab_size: int, k: int) -> None:
    settings = make_settings(vocab_size=vocab_size, k=k, seq_len=61, temperatures=(1.0, 0.7))
    block = make_block(settings, rows=5)
    with ShardWriter.open(tmp_path, settings) as writer:
        entry = writer.write(block)
        writer.finish()
    read = Dataset.open(tmp_path).read(0)
    for name in ("tokens", "loss_mask", "segments", "top_ids", "lse"):
        assert np.array_equal(getattr(read, name), getattr(block, name)), name
        assert getattr(read, name).dtype == getattr(block, name).dtype, name
    assert np.abs(np.exp(read.top_logprobs) - np.exp(block.top_logprobs)).max() < 6.7e-4
    np.testing.assert_allclose(read.top_logits - read.lse[..., :1], read.top_logprobs, atol=1e-5)
    assert entry.tokens == np.count_nonzero(block.segments) and entry.rows == 5
    assert verify(tmp_path) == []
    stored = load((tmp_path / "shard-00000.safetensors").read_bytes())["tokens"]
    assert stored.dtype == (np.uint16 if vocab_size <= 65_536 else np.uint32)


def test_ties_keep_their_order(tmp_path: Path) -> None:
    """Logits closer than the coding get one code; the ids still stand in the order of the logits."""
    settings = make_settings(k=4, seq_len=1)
    logprobs = np.array([[[-1.5, -1.5, -1.5000001, -1.5000002]]], np.float32)
    ids = np.array([[[7, 9, 3, 5]]], np.int32)
    one = np.ones((1, 1))
    block = Block(
        one.astype(np.int32), one.astype(bool), one.astype(np.uint8), ids, logprobs, np.ones((1, 1, 1), np.float32)
    )
    with ShardWriter.open(tmp_path, settings) as writer:
        writer.write(block)
    read = Dataset.open(tmp_path).read(0)
    assert read.top_ids.tolist() == [[[7, 9, 3, 5]]] and len(set(read.top_logprobs.ravel().tolist())) == 1


def test_bytes_a_token(tmp_path: Path) -> None:
    settings = make_settings(vocab_size=BIG, k=32, seq_len=512)
    with ShardWriter.open(tmp_path, settings) as writer:
        block = make_block(settings, rows=8)
        writer.write(replace(block, segments=np.ones_like(block.segments)))
    everything = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 125 < everything / (8 * 512) <= 128


def test_no_rows_and_no_shards(tmp_path: Path) -> None:
    settings = make_settings()
    with ShardWriter.open(tmp_path / "a", settings) as writer:
        writer.finish()
    assert inspect_dataset(tmp_path / "a")["tokens"] == 0 and verify(tmp_path / "a") == []
    with ShardWriter.open(tmp_path / "b", settings) as writer:
        writer.write(make_block(settings, rows=0))
        writer.finish()
    assert Dataset.open(tmp_path / "b").read(0).top_ids.shape == (0, 64, 8)
    assert verify(tmp_path / "b") == [] and inspect_dataset(tmp_path / "b")["mean_top1_probability"] is None


def test_writer_refuses_impossible_blocks(tmp_path: Path) -> None:
    settings = make_settings()
    good = make_block(settings)
    rising = good.top_logprobs[..., ::-1].copy()
    gap = good.segments.copy()
    gap[0, 5] = 0
    twice = good.top_ids.copy()
    twice[0, 0, 1] = twice[0, 0, 0]
    nan = good.lse.copy()
    nan[0, 0] = np.nan
    bad = {
        "tokens is int64": replace(good, tokens=good.tokens.astype(np.int64)),
        r"top_ids is int32 \[4, 64, 7\]": replace(good, top_ids=good.top_ids[..., :7]),
        "tokens has an id": replace(good, tokens=good.tokens + 300),
        "top_ids has an id": replace(good, top_ids=good.top_ids - 300),
        "twice": replace(good, top_ids=twice),
        "does not fall": replace(good, top_logprobs=rising),
        "sum to more than 1": replace(good, top_logprobs=good.top_logprobs + 1),
        "lse": replace(good, lse=nan),
        "start at 1": replace(good, segments=np.where(good.segments > 0, good.segments + 1, 0).astype(np.uint8)),
        "count up": replace(good, segments=gap, loss_mask=np.zeros_like(good.loss_mask)),
        "trains on padding": replace(good, loss_mask=np.ones_like(good.loss_mask)),
    }
    with ShardWriter.open(tmp_path, settings) as writer:
        for message, block in bad.items():
            with pytest.raises(ValueError, match=message):
                writer.write(block)
        assert writer.finished_shards == 0 and contents(tmp_path).keys() == {"manifest.json"}
        writer.write(good)
        with pytest.raises(ValueError, match="finished already"):
            writer.write(good, 0)


# --- kills, resuming


def fork(work: Callable[[], None]) -> int:
    """Runs `work` in a child process that leaves nothing behind but its files."""
    if pid := os.fork():
        return pid
    try:
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def kill_at_random(folder: Path) -> None:
    dice, kills, code = random.Random(0), 0, -1
    start = time.perf_counter()
    assert os.waitpid(fork(lambda: collect(folder / "whole", 30)), 0)[1] == 0
    whole = time.perf_counter() - start
    while code != 0:
        pid = fork(lambda: collect(folder / "killed", 30))
        time.sleep(dice.uniform(0, whole / 12) if kills < 12 else whole * 10)
        os.kill(pid, signal.SIGKILL)
        code = os.waitpid(pid, 0)[1]
        assert code in (0, signal.SIGKILL)
        kills += code != 0
    assert kills > 0  # how many there are depends on how busy the machine is


def kill_everywhere(folder: Path) -> None:
    """A collection for every call that changes the disk, killed right before or after that call."""

    def work(path: Path, calls: int) -> None:
        left = itertools.count(calls, -1)

        def deadly(call: Any) -> Any:
            def wrapped(*arguments: Any, **options: Any) -> Any:
                if next(left) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = call(*arguments, **options)
                if next(left) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return wrapped

        for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "mkdir"), (Path, "open")):
            setattr(owner, name, deadly(getattr(owner, name)))
        collect(path, 2)

    for calls in itertools.count():
        path = folder / str(calls)
        code = os.waitpid(fork(lambda path=path, calls=calls: work(path, calls)), 0)[1]  # type: ignore[misc]
        if (path / "manifest.json").exists():  # what is listed is whole, at any instant
            assert verify(path) == []
        assert os.waitpid(fork(lambda path=path: collect(path, 2)), 0)[1] == 0  # type: ignore[misc]
        if code == 0:
            return
        assert code == signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill_at_random", "kill_everywhere"])
def test_killed_collection_ends_with_the_same_bytes(tmp_path: Path, how: str) -> None:
    # In a process of its own: forking is safe only where no library has started threads.
    script = f"import pathlib, test_shards as t; t.{how}(pathlib.Path({str(tmp_path)!r}))"
    paths = os.pathsep.join(map(str, (ROOT, *Path(__file__).parents[:3])))
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": paths}, check=True, timeout=60)
    folders = list(tmp_path.iterdir())
    assert len(folders) == 2 if how == "kill_at_random" else len(folders) > 20
    for folder in folders:
        assert contents(folder) == contents(folders[0]), folder
        assert verify(folder) == [] and Dataset.open(folder).complete


def test_resume(tmp_path: Path) -> None:
    settings = make_settings()
    with ShardWriter.open(tmp_path, settings) as writer:
        writer.write(make_block(settings, seed=2), 2)
        assert writer.missing(4) == [0, 1, 3] and not Dataset.open(tmp_path).complete
    (tmp_path / ".tmp-shard-00000.safetensors").write_bytes(b"half")
    (tmp_path / "shard-00001.safetensors").write_bytes(b"renamed, but never listed")
    with ShardWriter.open(tmp_path, settings) as writer:
        assert not (tmp_path / ".tmp-shard-00000.safetensors").exists()
        for _ in range(3):  # without an index, the first that is missing
            writer.write(make_block(settings, seed=writer.missing(4)[0]))
        writer.finish()
    collect(tmp_path / "whole", 4)
    assert contents(tmp_path / "whole") == contents(tmp_path)


def test_complete_dataset_is_left_alone(tmp_path: Path) -> None:
    collect(tmp_path, 2)
    before = (tmp_path / "manifest.json").stat().st_mtime_ns
    collect(tmp_path, 2)
    assert (tmp_path / "manifest.json").stat().st_mtime_ns == before
    (tmp_path / "shard-00001.safetensors").unlink()
    with ShardWriter.open(tmp_path, make_settings()) as writer:
        assert writer.missing(2) == [1] and not Dataset.open(tmp_path).complete


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 7}, r"k = 8, not 7"),
        ({"seed": 2}, r"seed = 1, not 2"),
        ({"temperatures": (1.0, 0.5)}, r"temperatures\[1\] = \"absent\", not 0.5"),
        ({"sources": [{"name": "a", "sha256": "1"}]}, r"sources\[0\].sha256 = \"0\", not \"1\""),
        ({"teacher": "other"}, r"teacher.hash = \"h\", not \"other\""),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    common: dict[str, Any] = {"seed": 1, "sources": [{"name": "a", "sha256": "0"}]}
    collect(tmp_path, 1, make_settings(**common))
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        ShardWriter.open(tmp_path, make_settings(**{**common, **change}))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert contents(tmp_path) == before


def test_settings_are_checked_and_copied() -> None:
    values = make_settings().values
    later = DatasetSettings(values)
    values["k"] = 3
    assert later.k == 8 and later.temperatures == (1.0,) and later == make_settings()
    wrongs = ({"k": 0}, {"k": 301}, {"vocab_size": "9"}, {"temperatures": (0.5,)}, {"teacher": "t"})
    for wrong in wrongs:
        with pytest.raises(ValueError, match="settings"):
            DatasetSettings({**later.values, **wrong})


# --- folders


def test_foreign_folders(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"not empty.*thesis\.tex"):
        ShardWriter.open(tmp_path, make_settings())
    (tmp_path / "thesis.tex").rename(tmp_path / "manifest.json")
    with pytest.raises(UserError, match="not valid JSON"):
        ShardWriter.open(tmp_path, make_settings())
    (tmp_path / "manifest.json").write_text('{"manifest_version": 3}')
    with pytest.raises(UserError, match="not a manifest of bitdraft's"):
        ShardWriter.open(tmp_path, make_settings())
    with pytest.raises(UserError, match="cannot write to"):
        ShardWriter.open(tmp_path / "manifest.json" / "below", make_settings())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write to"):
        ShardWriter.open(tmp_path, make_settings())


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with (
        ShardWriter.open(tmp_path, make_settings()),
        pytest.raises(UserError, match="another process is writing"),
    ):
        ShardWriter.open(tmp_path, make_settings())
    ShardWriter.open(tmp_path, make_settings()).close()


def test_full_disk(tmp_path: Path) -> None:
    """A limit on file sizes stands in for a full disk: the write fails half way through a shard."""
    settings = make_settings()
    with ShardWriter.open(tmp_path, settings) as writer:
        writer.write(make_block(settings))
        before = contents(tmp_path)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
        try:
            with pytest.raises(UserError, match=f"no room left in {tmp_path}"):
                writer.write(make_block(settings, seed=1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert contents(tmp_path) == before and writer.finished_shards == 1
        writer.write(make_block(settings, seed=1))
        writer.finish()
    collect(tmp_path / "whole", 2)
    assert contents(tmp_path / "whole") == contents(tmp_path)


# --- damage


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone", "swapped"])
def test_damaged_shard(tmp_path: Path, damage: str) -> None:
    collect(tmp_path, 3)
    whole = contents(tmp_path)
    path = tmp_path / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[:-1])
    elif damage == "flipped":
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    elif damage == "swapped":
        path.write_bytes(whole["shard-00002.safetensors"])
    else:
        path.unlink()
    dataset = Dataset.open(tmp_path)
    dataset.read(0)
    with pytest.raises(UserError, match="shard-00001"):
        dataset.read(1)
    problems = verify(tmp_path)
    assert [problem.file for problem in problems] == ["shard-00001.safetensors"]
    mine = tmp_path / "shard-99999.safetensors"
    mine.write_bytes(b"someone's")
    verify(tmp_path, repair=True)
    assert not Dataset.open(tmp_path).complete and len(Dataset.open(tmp_path).shards) == 2
    assert verify(tmp_path) == []
    collect(tmp_path, 3)
    assert mine.read_bytes() == b"someone's"
    mine.unlink()
    assert contents(tmp_path) == whole


def _set(name: str, index: Any, value: Any) -> Any:
    return lambda tensors: tensors[name].__setitem__(index, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("tokens", (0, 0), 300), "tokens has an id"),
        (_set("top_ids", (0, 0), 255), "top_ids has an id"),
        (_set("top_logits", (0, 0), 0), "sum to more than 1"),
        (_set("top_logits", (0, 0, slice(0, 3)), 255), "does not fall"),
        (_set("lse", (0, 0, 0), np.inf), "lse is not finite"),
        (_set("document", (0, 0), 9), "document"),
        (_set("loss_mask", 0, 0), "trained_tokens, the manifest says"),
        (lambda tensors: tensors.update(lse=tensors["lse"].astype(np.float64)), "lse is float64"),
        (lambda tensors: tensors.update(tokens=tensors["tokens"][:2]), r"tokens is uint16 \[2, 64\]"),
        (lambda tensors: tensors.pop("document"), "tensor document is missing"),
    ],
)
def test_verify_looks_at_values(tmp_path: Path, change: Any, message: str) -> None:
    collect(tmp_path, 2)
    reseal(tmp_path, 1, change)
    problems = verify(tmp_path)
    assert {problem.file for problem in problems} == {"shard-00001.safetensors"}
    assert any(re.search(message, str(problem)) for problem in problems), problems


def test_a_link_to_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("disk/target")
    collect(tmp_path / "link", 1)
    assert (tmp_path / "link").is_symlink() and verify(tmp_path / "disk" / "target") == []


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "shard-00000.safetensors/../../x", "other.safetensors", 5])
def test_manifest_cannot_name_files_outside(tmp_path: Path, name: Any) -> None:
    collect(tmp_path, 1)
    edit_manifest(tmp_path, lambda manifest: manifest["shards"][0].update(file=name))
    with pytest.raises(UserError, match=r"manifest\.json: is damaged"):
        Dataset.open(tmp_path)
    assert [problem.file for problem in verify(tmp_path)] == ["manifest.json"]


def test_bad_manifests(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such dataset"):
        Dataset.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a dataset"):
        verify(tmp_path)
    collect(tmp_path, 2)
    good = (tmp_path / "manifest.json").read_bytes()
    changes = {
        "format version 2": lambda m: m.update(version=2),
        "listed twice": lambda m: m["shards"].append(m["shards"][0]),
        "is damaged": lambda m: m.pop("settings"),
        "impossible count": lambda m: m["shards"][0].update(rows=-1),
        "settings": lambda m: m["settings"].pop("k"),
    }
    for message, change in changes.items():
        edit_manifest(tmp_path, change)
        with pytest.raises(UserError, match=message) as caught:
            Dataset.open(tmp_path)
        assert "manifest.json" in str(caught.value) and "\n" not in str(caught.value)
        (tmp_path / "manifest.json").write_bytes(good)
    for bad in (good[:100], b"\xff", b"[" * 100_000, b""):
        (tmp_path / "manifest.json").write_bytes(bad)
        with pytest.raises(UserError, match=r"manifest\.json"):
            Dataset.open(tmp_path)
    (tmp_path / "manifest.json").write_bytes(good)
    edit_manifest(tmp_path, lambda m: m["shards"].pop(0))
    assert [problem.file for problem in verify(tmp_path)] == ["shard-00000.safetensors"]


def test_verify_finds_every_byte(tmp_path: Path) -> None:
    """Every byte of the manifests, and some of each file; benchmarks/verify_sweep.py changes all of them."""
    settings = make_settings(k=2, seq_len=8)
    data, replies = tmp_path / "data", tmp_path / "replies"
    with ReplyWriter.open(replies, DatasetSettings(settings.values | {"seed": 0})) as replied:
        for index in range(2):
            replied.write([Example(0, index, np.arange(20, dtype=np.int32), np.arange(20) > 9, True, "code")])
        omission = Omission("a.jsonl", "empty", 3, "line 1")
        replied.note_omissions((omission,), (omission,))
        replied.finish()
    with ShardWriter.open(data, settings) as writer:
        writer.score_from(ScoredFrom("replies", sha256(replies / "manifest.json")))
        for index in range(2):
            writer.write(make_block(settings, seed=index))
        writer.finish()
    assert verify(data) == verify(replies) == []

    def found(folder: Path, path: Path) -> bool:
        try:
            return any((folder / problem.file).resolve() == path.resolve() for problem in verify(folder))
        except UserError as error:  # of another version or kind, by what it says
            return str(path.parent) in str(error)

    for path in (*data.iterdir(), *replies.iterdir()):
        whole = path.read_bytes()
        more = path.with_name(path.name.replace("00000", "00099"))
        for at in range(0, len(whole), 1 if path.name == "manifest.json" else 7):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 + at % 255)]) + whole[at + 1 :])
            assert found(data, path) and found(path.parent, path), (path, at)
        for other in (whole[:-1], whole + b"\n", whole + b"\0", whole.replace(b",\n", b", \n", 1), b""):
            path.write_bytes(other)
            assert other == whole or (found(data, path) and found(path.parent, path)), (path, other)
        path.unlink()
        assert found(data, path) and found(path.parent, path)
        path.write_bytes(whole)
        if more != path:
            more.write_bytes(whole)
            assert found(data, more)
            more.unlink()
    assert verify(data) == []


def test_a_changed_manifest_is_never_written_over(tmp_path: Path) -> None:
    """Nobody can tell what it said; a line that says something else of a file than it holds makes that file broken."""
    collect(tmp_path, 3, make_settings(note=1))
    whole, path = contents(tmp_path), tmp_path / "manifest.json"
    path.write_bytes(whole["manifest.json"].replace(b'"note": 1', b'"note": 7'))
    changed = path.read_bytes()
    for use in (Dataset.open, lambda folder: collect(folder, 3, make_settings(note=7))):
        with pytest.raises(UserError, match=r"manifest\.json: was changed since it was written"):
            use(tmp_path)
    assert [problem.file for problem in verify(tmp_path, repair=True)] == ["manifest.json"]
    assert path.read_bytes() == changed

    path.write_bytes(whole["manifest.json"].replace(b'"rows": 4', b'"rows": 5', 1))
    verify(tmp_path, repair=True)
    assert contents(tmp_path).keys() == whole.keys() - {"shard-00000.safetensors"}
    collect(tmp_path, 3, make_settings(note=1))
    assert contents(tmp_path) == whole


def test_a_manifest_without_a_hash_goes_on_without(tmp_path: Path) -> None:
    """Of an earlier version: others may hold the hash of its bytes."""
    collect(tmp_path, 3)
    path = tmp_path / "manifest.json"
    path.write_text(unsealed(path))
    before = contents(tmp_path)
    assert verify(tmp_path) == []
    collect(tmp_path, 3)
    assert contents(tmp_path) == before
    (tmp_path / "shard-00001.safetensors").unlink()
    collect(tmp_path, 3)
    assert contents(tmp_path) == before


# --- the older format


def make_old(folder: Path, replies: int = 0, complete: bool = True) -> None:
    """Rewrites a dataset's manifest as 0.1.0 wrote it, and puts replies into it as that did."""
    about: dict[str, Any] = {}

    def rewrite(manifest: dict[str, Any]) -> None:
        manifest["settings"].update(collection_format=2, reply=True, reply_batch=4)
        manifest.update(version=1, complete=complete)
        about.update(manifest)

    edit_manifest(folder, rewrite)
    for source in range(replies):
        tokens, lengths = np.arange(30, dtype=np.uint16), np.array([12, 18], np.uint32)
        tensors = {"tokens": tokens, "lengths": lengths, "prompt_lengths": lengths // 2, "prompts": lengths - 12}
        data = save(tensors)
        entry = {"file": "reply-00000.safetensors", "rows": 2, "tokens": 30, "trained_tokens": 15, "documents": 2}
        entry |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        inside = folder / f"replies-{source}"
        inside.mkdir()
        (inside / "reply-00000.safetensors").write_bytes(data)
        (inside / "manifest.json").write_text(json.dumps({**about, "format": "bitdraft replies", "shards": [entry]}))


def test_whole_datasets_of_the_older_format_are_read(tmp_path: Path) -> None:
    collect(tmp_path / "new", 3)
    collect(tmp_path / "old", 3)
    make_old(tmp_path / "old", replies=2)
    new, old = Dataset.open(tmp_path / "new"), Dataset.open(tmp_path / "old")
    assert (old.format, old.complete, old.tokens) == (2, True, new.tokens)
    for one, other in zip(old, new, strict=True):
        assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in vars(one))
    assert newest_dataset(tmp_path, "h") == tmp_path / "old"
    facts = inspect_dataset(tmp_path / "old")
    assert facts["format"] == 2 and facts["replies"] == [] and "complete, format 2" in table(facts)
    assert verify(tmp_path / "old") == []
    reply = tmp_path / "old" / "replies-1" / "reply-00000.safetensors"
    reply.write_bytes(reply.read_bytes()[:-1] + b"\xff")
    assert [problem.file for problem in verify(tmp_path / "old")] == ["replies-1/reply-00000.safetensors"]

    before = contents(tmp_path / "old")
    for write in (lambda: ShardWriter.open(tmp_path / "old", make_settings()), lambda: verify(tmp_path / "old", True)):
        with pytest.raises(UserError, match="of the older format 2, which this version reads but does not write"):
            write()
    assert contents(tmp_path / "old") == before


def test_unfinished_datasets_of_the_older_format_are_refused(tmp_path: Path) -> None:
    collect(tmp_path, 2)
    make_old(tmp_path, complete=False)
    before = contents(tmp_path)
    settings = make_settings()
    for use in (Dataset.open, verify, inspect_dataset, lambda folder: ShardWriter.open(folder, settings)):
        with pytest.raises(UserError, match=r"unfinished dataset of the older format 2.*; begin anew") as refused:
            use(tmp_path)
        assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_a_draft_is_trained_on_the_older_format(tmp_path: Path) -> None:
    synthetic.dataset(tmp_path / "data", synthetic.teacher_folder(tmp_path / "teacher"))
    make_old(tmp_path / "data")
    settings = TrainSettings(layers=1, hidden=64, tokens=2000, batch=4, evals=1, live_prompts=0)
    summary = train(tmp_path / "data", tmp_path / "teacher", tmp_path / "draft", settings, quiet=True)
    assert summary.tokens >= 2000 and (tmp_path / "draft" / "model.safetensors").exists()


# --- what is in it, which is newest


def test_the_table_is_for_people(tmp_path: Path) -> None:
    settings = make_settings(
        sources=[{"name": "a.jsonl", "sha256": "ab" * 32, "kind": "file"}], exclude=[], reply=True, tokens=150_000
    )
    collect(tmp_path, 2, settings)
    lines = table(inspect_dataset(tmp_path)).splitlines()
    assert lines[0] == str(tmp_path) and any(line.split() == ["a.jsonl", "file", "sha256", "ab" * 6] for line in lines)
    assert any(line.split() == ["reply", "yes"] for line in lines)
    assert not any(character in line for line in lines for character in "{}[]'")


def test_inspect(tmp_path: Path) -> None:
    collect(tmp_path, 3)
    settings = make_settings()
    blocks = [make_block(settings, seed=seed) for seed in range(3)]
    p = np.concatenate([np.exp(block.top_logprobs[block.loss_mask]) for block in blocks])
    found = inspect_dataset(tmp_path)
    assert found["tokens"] == sum(np.count_nonzero(block.segments) for block in blocks)
    assert found["trained_tokens"] == len(p) and found["rows"] == 12 and found["complete"]
    assert found["documents"] == sum(int(block.segments.max(1).sum()) for block in blocks)
    assert found["mean_top1_probability"] == pytest.approx(p[:, 0].mean(), abs=7e-4)
    assert found["mean_tail_mass"] == pytest.approx(1 - p.sum(1).mean(), abs=3e-3)
    assert found["mean_entropy_at_least_nats"] > -(p * np.log(p)).sum(1).mean() - 0.01
    json.dumps(found, allow_nan=False)


def test_newest_dataset(tmp_path: Path) -> None:
    assert newest_dataset(tmp_path / "runs", "h") is None
    for age, name in enumerate(["b", "deep/a", "c"]):
        collect(tmp_path / name, 1)
        os.utime(tmp_path / name / "manifest.json", (1000 - age, 1000 - age))
    collect(tmp_path / "other", 1, make_settings(teacher="o"))
    ShardWriter.open(tmp_path / "unfinished", make_settings()).close()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "manifest.json").write_text("{}")
    assert newest_dataset(tmp_path, "h") == tmp_path / "b"
    os.utime(tmp_path / "deep/a/manifest.json", (2000, 2000))
    assert newest_dataset(tmp_path, "h") == tmp_path / "deep/a"
    assert newest_dataset(tmp_path, "o") == tmp_path / "other"
    assert newest_dataset(tmp_path, "nobody") is None
