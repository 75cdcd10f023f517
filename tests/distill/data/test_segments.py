"""Texts and conversations as rows of one length."""

from __future__ import annotations

from itertools import islice, pairwise

import numpy as np
from conftest import ROOT

from distill.data.packing import Segment, cut, pack
from distill.data.prompts import split_text, wants_reply
from distill.data.sources import Document, read_source


def test_pack_keeps_every_token_once() -> None:
    rng = np.random.default_rng(0)
    segments = []
    for i, size in enumerate(rng.integers(8, 33, 300)):
        tokens = np.full(size, i + 1, np.int32)
        segments.append(Segment(tokens, tokens % 2 == 0))
    rows = pack(segments, 64)
    assert sum(int((ids > 0).sum()) for _, _, ids in rows) == sum(len(p.tokens) for p in segments)
    assert len(rows) < 1.1 * sum(len(p.tokens) for p in segments) / 64
    seen: list[int] = []
    for tokens, mask, ids in rows:
        assert not mask[ids == 0].any() and not tokens[ids == 0].any()
        for number in sorted(set(ids.tolist()) - {0}):
            (value,) = set(tokens[ids == number].tolist())
            seen.append(value)
            assert len(segments[value - 1].tokens) == (ids == number).sum()
            assert set(mask[ids == number].tolist()) == {value % 2 == 0}
    assert sorted(seen) == list(range(1, 301))


def test_cut_drops_ends_too_short_to_learn_from() -> None:
    def sizes(length: int, trained_from: int = 0) -> list[int]:
        mask = np.arange(length) >= trained_from
        return [len(part.tokens) for part in cut(Segment(np.zeros(length, np.int32), mask), 32)]

    assert sizes(70) == [32, 32]
    assert sizes(72) == [32, 32, 8]
    assert sizes(7) == []
    assert sizes(70, trained_from=40) == [32]


def test_split_text() -> None:
    text = "word " * 500 + "\n\n" + "unbroken" * 100
    parts = list(split_text(Document("text", text, None, 1), 300))
    assert "".join(part.text or "" for part in parts) == text
    assert max(len(part.text or "") for part in parts) <= 300 < len(text)
    prompt = Document("prompt", text, None, 1)
    assert list(split_text(prompt, 300)) == [prompt]


def test_texts_are_not_cut_inside_words() -> None:
    """Behind an empty line too, where the next one is far, and at white space of any kind."""
    novels = [document.text or "" for document in islice(read_source(str(ROOT / "data" / "novels.jsonl.xz")), 60)]
    hard = ["\n\n" + "word " * 200, "one\ttwo\nthree\u3000" * 99, ("x" * 299 + " ") * 3, "\n\n".join(["ab " * 99] * 9)]
    cuts = 0
    for text in [*hard, *novels]:
        parts = [part.text or "" for part in split_text(Document("text", text, None, 1), 300)]
        assert "".join(parts) == text and max(map(len, parts)) <= 300
        for before, after in pairwise(parts):
            assert before and (before[-1].isspace() or after[0].isspace()), (before[-20:], after[:20])
        cuts += len(parts) - 1
    assert cuts > 100


def test_wants_reply() -> None:
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    assert wants_reply(Document("prompt", "a", None, 1))
    assert not wants_reply(Document("text", "a", None, 1))
    assert wants_reply(Document("messages", None, [user, assistant, user], 1))
    assert not wants_reply(Document("messages", None, [user, assistant], 1))
