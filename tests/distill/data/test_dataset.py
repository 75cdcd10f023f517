"""Teacher replies, kept in the store that shards share."""

import hashlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Command, changed_copy
from safetensors.numpy import save
from synthetic import dataset, teacher_folder

from distill.data.inspection import verify
from distill.data.manifest import DatasetSettings
from distill.data.reply_dataset import Example, Replies, ReplyWriter
from distill.data.shards import Dataset
from kernels.errors import UserError

BIG = 128_256


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def reply_settings(vocab_size: int = BIG) -> DatasetSettings:
    return DatasetSettings({"teacher": {"name": "t", "hash": "h"}, "tokenizer_hash": "x", "vocab_size": vocab_size})


def make_replies(batch: int, vocab_size: int = BIG) -> list[Example]:
    rng = np.random.default_rng(batch)
    sizes = rng.integers(0, 40, 6)
    return [
        Example(
            i % 2, 6 * batch + i, rng.integers(0, vocab_size, n).astype(np.int32), rng.random(n) < 0.6, n > 20, kind
        )
        for i, (n, kind) in enumerate(zip(sizes, ("code", "", "maths", "Ünsinn, groß", "code", "code"), strict=True))
    ]


@pytest.mark.parametrize("vocab_size", [500, BIG])
def test_replies(tmp_path: Path, vocab_size: int) -> None:
    with ReplyWriter.open(tmp_path, reply_settings(vocab_size)) as writer:
        for index in (1, 0):
            writer.write(make_replies(index, vocab_size), index)
        writer.write([])
        writer.finish()
    replies = Replies.open(tmp_path)
    expected = make_replies(0, vocab_size) + make_replies(1, vocab_size)
    read = list(replies)
    assert replies.complete and replies.tokens == sum(len(reply.tokens) for reply in expected)
    for one, other in zip(read, expected, strict=True):
        assert replace(one, tokens=other.tokens, trained=other.trained) == other
        assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.trained, other.trained)
    with pytest.raises(UserError, match="holds replies, not shards"):
        Dataset.open(tmp_path)
    path = tmp_path / "reply-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(UserError, match="reply-00001"):
        replies.read(1)


def in_time(seconds: int = 20) -> None:
    """Ends a test that waits for ever."""

    def late(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)


def test_a_pipe_in_a_files_place_is_named(
    small_teacher: Path, weak_draft: Path, inside: Command, tmp_path: Path
) -> None:
    """Nobody waits for what may come out of it."""
    shards = dataset(tmp_path / "shards", teacher_folder(tmp_path / "teacher"))
    with ReplyWriter.open(tmp_path / "replies", reply_settings()) as writer:
        writer.write(make_replies(0))
        writer.finish()
    in_time()
    try:
        for path in (shards / "shard-00001.safetensors", tmp_path / "replies" / "reply-00000.safetensors"):
            path.unlink()
            os.mkfifo(path)
            found = inside("distill", "verify", path.parent)
            assert found.code == 1 and f"{path.name}: is no file" in found.out + found.err
            inside("distill", "inspect", path.parent).refused("distill", f"{path}: is no file")
            inside("distill", "verify", "--repair", path.parent).refused("distill", f"{path}: is no file")
            manifest = path.with_name("manifest.json")
            manifest.unlink()
            os.mkfifo(manifest)
            inside("distill", "inspect", path.parent).refused("distill", f"{manifest}: is no file")
        for name, option, model in (
            ("config.json", "--teacher", small_teacher),
            ("model.safetensors", "--teacher", small_teacher),
            ("draft.json", "--draft", weak_draft),
        ):
            left_out = {name.replace(".", "__"): None}
            path = changed_copy(model, tmp_path / f"with-{name}", **left_out) / name
            os.mkfifo(path)
            inside("distill", "evaluate", option, path.parent).refused("distill", f"{path}: is no file")
        os.mkfifo(tmp_path / "evaluation.json")
        options = ("--draft", weak_draft, "--out", tmp_path)
        inside("distill", "evaluate", *options).refused("distill", f"{tmp_path / 'evaluation.json'}: is no file")
    finally:
        signal.alarm(0)


def test_replies_resume(tmp_path: Path) -> None:
    for folder, stops in ((tmp_path / "a", [3]), (tmp_path / "b", [1, 2, 3])):
        for stop in stops:
            with ReplyWriter.open(folder, reply_settings()) as writer:
                for index in writer.missing(stop):
                    writer.write(make_replies(index), index)
        with ReplyWriter.open(folder, reply_settings()) as writer:
            writer.finish()
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with ReplyWriter.open(tmp_path / "c", reply_settings()) as writer:
        with pytest.raises(ValueError, match="within the vocabulary"):
            writer.write([Example(0, 0, np.array([BIG], np.int32), np.ones(1, bool), True)])
        with pytest.raises(ValueError, match="whether it is learnt"):
            writer.write([Example(0, 0, np.zeros(3, np.int32), np.ones(4, bool), True)])


def test_whole_replies_of_the_older_format_are_read(tmp_path: Path) -> None:
    """Of format 3, which kept the length of a prompt."""
    tensors = {
        "tokens": np.arange(30, dtype=np.uint16),
        "lengths": np.array([12, 18], np.uint32),
        "prompt_lengths": np.array([5, 0], np.uint32),
        "prompts": np.array([0, 3], np.uint32),
        "sources": np.array([1, 2], np.uint32),
        "replied": np.array([1, 0], np.uint8),
    }

    def write() -> None:
        data = save(tensors)
        entry = {"file": "reply-00000.safetensors", "rows": 2, "tokens": 30, "trained_tokens": 25, "documents": 2}
        entry |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        about = {"format": "bitdraft replies", "version": 3, "complete": True, "shards": [entry]}
        (tmp_path / "reply-00000.safetensors").write_bytes(data)
        (tmp_path / "manifest.json").write_text(json.dumps(about | {"settings": reply_settings(500).values}))

    write()
    prompt, text = Replies.open(tmp_path)
    assert (prompt.source, prompt.number, prompt.replied, prompt.kind) == (1, 0, True, "")
    assert (text.source, text.number, text.replied) == (2, 3, False)
    assert prompt.tokens.tolist() == list(range(12)) and text.tokens.tolist() == list(range(12, 30))
    assert prompt.trained.tolist() == [False] * 5 + [True] * 7 and text.trained.all()
    assert verify(tmp_path) == []
    tensors["prompt_lengths"] = np.array([13, 0], np.uint32)
    write()
    assert [problem.message for problem in verify(tmp_path)] == ["lengths or tokens are impossible"]
