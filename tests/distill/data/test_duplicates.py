"""Near duplicates: the rule by its numbers, and the quick way against the rule itself."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from distill.data import duplicates
from distill.data.duplicates import WORDS, NearDuplicates, Parts, near
from distill.data.sources import normalise_prompt

ROOT = Path(__file__).parents[3]
NUMBERS = [f"number{i}" for i in range(WORDS)]
Sets = tuple[set[str], set[str]]


def sets(text: str) -> Sets:
    """Of a normalised text: the words in a row, and the shingles."""
    words = text.split(" ")
    runs = {" ".join(words[i : i + 13]) for i in range(len(words) - 12)}
    return runs, {text[i : i + 5] for i in range(len(text) - 4)} or {text}


def rule(one: Sets, other: Sets) -> tuple[bool, bool]:
    """Whether two texts share words in a row, and whether their sets of shingles are alike."""
    return not one[0].isdisjoint(other[0]), 5 * len(one[1] & other[1]) > 4 * len(one[1] | other[1])


def both(one: str, other: str) -> bool:
    """Whether two texts are near, by every way to ask."""
    answer = near(one, other)
    held = NearDuplicates([one])
    assert held.find(Parts(other)) == (normalise_prompt(one) if answer else None)
    assert held.add(Parts(other)) == held.find(Parts(one if answer else "?")) and len(held) == 2 - answer
    assert near(other, one) == answer
    return answer


def test_words_in_a_row() -> None:
    def padded(words: int) -> tuple[str, str]:
        shared = " ".join(NUMBERS[:words])
        return f"{'alpha ' * 40}{shared}{' beta' * 40}", f"{'gamma ' * 40}{shared.upper()}\n{' delta' * 40}"

    assert both(*padded(13)) and not both(*padded(12))
    assert both("x " * 50, "x " * 13 + " ".join(NUMBERS))


@pytest.mark.parametrize("size", [9, 90, 900, 9000])
def test_jaccard_index(size: int) -> None:
    """A text without repeated shingles, and one cut from its end: the index is the share that is left."""
    text = "".join(chr(0x4E00 + i) for i in range(size + 4))
    most = 4 * size // 5
    assert both(text, text[: most + 1 + 4]) and not both(text, text[: most + 4])
    assert not both(text, text[::-1])


def test_short_texts() -> None:
    assert both("Go!", " GO! ") and both("", "  ") and both("Straße", "STRASSE")
    assert not both("Go!", "Go.") and not both("", "a") and not both("abcd", "abcde")


def test_the_first_of_those_near_is_given_back() -> None:
    middle = "Write a poem about the old lighthouse at the end of the bay, in four lines."
    first, last = middle.replace("four", "five"), middle.replace("lines", "line s")
    assert NearDuplicates([first, last]).find(Parts(middle)) == normalise_prompt(first)
    assert NearDuplicates([last, first]).find(Parts(middle)) == normalise_prompt(last)


def test_held_texts_may_be_near_each_other_and_added_ones_may_not() -> None:
    """Near is not transitive: the last is near the second alone, which only what holds all of them can say."""
    texts = ["x" + "".join(chr(0x4E00 + i) for i in range(start, start + 100)) for start in (0, 8, 16)]
    assert near(texts[0], texts[1]) and near(texts[1], texts[2]) and not near(texts[0], texts[2])
    assert NearDuplicates(texts[:2]).find(Parts(texts[2])) == texts[1]
    added = NearDuplicates()
    assert [added.add(Parts(text)) for text in texts] == [None, texts[0], None]


def test_against_the_rule_itself() -> None:
    """Random changes of real prompts, of few words and of many, each compared with all before it."""
    prompts = [json.loads(line)["prompt"] for line in (ROOT / "data" / "eval.jsonl").open(encoding="utf-8")]
    rng = random.Random(5)
    texts = rng.sample(prompts, 60)
    for text in list(texts):
        words = text.split()
        for share in (0.02, 0.05, 0.1):
            changed = [rng.choice(words) if rng.random() < share else word for word in words]
            texts.append(" ".join(changed))
    rng.shuffle(texts)
    held, kept, found = NearDuplicates(), list[str](), 0
    for text in texts:
        expected = next((normalise_prompt(earlier) for earlier in kept if near(earlier, text)), None)
        assert held.find(Parts(text)) == held.add(Parts(text)) == expected
        found += expected is not None
        kept += [text] if expected is None else []
    assert 20 < found < 220


@pytest.mark.parametrize("recent", [100, duplicates.RECENT])
def test_edits_about_the_thresholds_against_the_rule_itself(recent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of few letters, long and short, and edits that leave about 4/5 of the shingles, or 11 to 15 words in a row;
    more than are held before the shingles are put in order. In between, the last ones are forgotten, or not: an index
    of many sorted parts, and of few."""
    monkeypatch.setattr(duplicates, "RECENT", recent)
    rng = random.Random(18)

    def word() -> str:
        return "".join(rng.choices("abcdeé", k=rng.randint(1, 4)))

    def edited(text: str) -> str:
        if rng.random() < 0.3:
            words = text.split()
            start = rng.randrange(len(words))
            return " ".join([word(), *words[start : start + rng.randint(11, 15)], *(word() for _ in words)])
        if rng.random() < 0.2:
            return text[: 4 * len(text) // 5 + rng.randint(-2, 4)]
        letters = list(text)
        for _ in range(max(0, len(text) // 45 + rng.randint(-2, 2))):  # each changes up to 5 shingles of both
            letters[rng.randrange(len(letters))] = rng.choice(["", "x", " ", "yz"])
        return "".join(letters)

    held, kept, found = NearDuplicates(), list[tuple[str, Sets]](), [0, 0]
    for _ in range(1800):
        fresh = len(kept) < 50 or rng.random() < 0.4
        text = " ".join(word() for _ in range(rng.choice((2, 6, 20, 60)))) if fresh else edited(rng.choice(kept)[0])
        parts = sets(normalise_prompt(text))
        near_ones = [(earlier, rule(other, parts)) for earlier, other in kept if any(rule(other, parts))]
        expected = near_ones[0][0] if near_ones else None
        assert held.find(Parts(text)) == held.add(Parts(text)) == expected
        found = [a + b for a, b in zip(found, near_ones[0][1] if near_ones else (0, 0), strict=True)]
        assert not near_ones or near(text, near_ones[0][0])
        kept += [] if near_ones else [(normalise_prompt(text), parts)]
        if rng.random() < 0.02:
            held.forget(len(kept) - 3)
            del kept[-3:]
    assert len(kept) > 1050 and min(found) > 50


def test_answers_do_not_depend_on_pythons_hashes() -> None:
    program = """
import json
from distill.data.duplicates import NearDuplicates, Parts
held = NearDuplicates()
for line in open("data/eval.jsonl", encoding="utf-8"):
    print(held.add(Parts(json.loads(line)["prompt"])))
"""
    said = {
        subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, env={"PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    }
    assert len(said) == 1
