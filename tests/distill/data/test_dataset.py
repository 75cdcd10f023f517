"""Teacher replies, kept in the store that shards share."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

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
            i % 2, 6 * batch + i, rng.integers(0, vocab_size, n).astype(np.int32), int(rng.integers(0, n + 1)), n > 20
        )
        for i, n in enumerate(sizes)
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
        assert replace(one, tokens=other.tokens) == other
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(read, expected, strict=True))
    with pytest.raises(UserError, match="holds replies, not shards"):
        Dataset.open(tmp_path)
    path = tmp_path / "reply-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(UserError, match="reply-00001"):
        replies.read(1)


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
            writer.write([Example(0, 0, np.array([BIG], np.int32), 0, True)])
        with pytest.raises(ValueError, match="shorter than its prompt"):
            writer.write([Example(0, 0, np.zeros(3, np.int32), 4, True)])
