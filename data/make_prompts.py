"""Make `data/prompts.jsonl` from the lists in `data/prompts/`; the same lists give the same bytes.

    python data/make_prompts.py

Each TOML file there is a kind of prompts: `templates`, and lists whose members fill the templates' slots. A template is
one user's turn, or a list of turns, the user's first and last. In it, and in members that are strings,

    {topic}         is a member of the list `topic`, the same one wherever it stands in a prompt
    {Topic}         is it with a capital letter
    {topic#2}       is another member
    {topic.field}   is a field of a member that is a table; what it says goes in unread

Lists are those of the file itself, those of `common.toml`, and

    {title}         the title of an article of `wiki.jsonl.xz`
    {article}       an article, which no other prompt quotes: `title`, `text`, and `short`, its first sentences
    {excerpt}       a passage of `novels.jsonl.xz`, which no other prompt quotes: `text` and `short`

A list is used up before a member of it comes again. What is near a prompt of `eval.jsonl`, or one made before, is left
out (distill/data/duplicates.py says what is near).
"""

import json
import lzma
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from distill.data.duplicates import NearDuplicates, Parts

DATA = Path(__file__).parent
LISTS = DATA / "prompts"
SLOT = re.compile(r"\{(\w+)(#\d)?(?:\.(\w+))?\}")
ABBREVIATED = re.compile(r"\b(Mrs?|Dr|St|Jr|Sr|Capt|Rev|Esq|Prof|Hon|Messrs|Col|Gen|Lt|vs|ca|approx|etc|cf)\.$")
HOLE = re.compile(r" {2}|\( |\(\)|\(,| ,|\n")  # where something was cut out of an article
UNQUOTED = "ENG18632_Reade"  # a novel that speaks of black people as its time did
LONG, SHORT, LEAST = 600, 240, 80  # characters of what is quoted: at most, of its first sentences, at least
COUNT = 300  # prompts of a kind
PATIENCE = 300  # prompts near others, one after the other, until a kind counts as used up

Turns = list[str]


def make_prompts() -> str:
    """The file: all prompts, mixed, a JSON object a line with `kind`, and `prompt` or `messages`."""
    held_out = NearDuplicates(line["prompt"] for line in _objects(DATA / "eval.jsonl"))
    common = _list_file("common") | _quotable()
    once = {name: iter(common.pop(name)) for name in ("article", "excerpt")}
    made, prompts = NearDuplicates(), list[dict[str, Any]]()
    for kind in sorted(path.stem for path in LISTS.glob("*.toml") if path.stem != "common"):
        lists = common | _list_file(kind)
        writer = Writer(lists, once, Random(kind))
        missing, misses = COUNT, 0
        while missing:
            turns = writer.write()
            said = "\n".join(turns[::2])
            if any(map(held_out.find, map(Parts, [said, *turns]))) or made.add(Parts(said)):
                misses += 1
                if misses == PATIENCE:
                    raise SystemExit(f"{LISTS / kind}.toml: too few different prompts, {missing} more are wanted")
                continue
            prompts.append({"kind": kind} | _said(turns))
            missing, misses = missing - 1, 0
    Random("order").shuffle(prompts)
    return "".join(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in prompts)


class Writer:
    """Fills the templates of one kind."""

    def __init__(self, lists: dict[str, Any], once: dict[str, Iterator[Any]], random: Random) -> None:
        self._lists, self._random = lists, random
        self._decks = dict(once)

    def write(self) -> Turns:
        template = self._draw("templates")
        drawn: dict[str, Any] = {}
        return [self._fill(turn, drawn) for turn in ([template] if isinstance(template, str) else template)]

    def _fill(self, text: str, drawn: dict[str, Any]) -> str:
        def filled(slot: re.Match[str]) -> str:
            name, again, field = slot.groups()
            members, key = name.lower(), name.lower() + (again or "")
            if key not in drawn:
                others = [value for other, value in drawn.items() if other.partition("#")[0] == members]
                while (member := self._draw(members)) in others:
                    pass
                drawn[key] = self._fill(member, drawn) if isinstance(member, str) else member
            value: str = drawn[key][field].strip() if field else drawn[key]
            return value[:1].upper() + value[1:] if name[0].isupper() else value

        return SLOT.sub(filled, text)

    def _draw(self, name: str) -> Any:
        if name not in self._decks:
            self._decks[name] = self._shuffled(self._lists[name])
        member = next(self._decks[name], None)
        if member is None:
            raise SystemExit(f"data/prompts: each {name} is quoted once, and none is left")
        return member

    def _shuffled(self, members: list[Any]) -> Iterator[Any]:
        while True:
            yield from self._random.sample(members, len(members))


def _said(turns: Turns) -> dict[str, Any]:
    if len(turns) == 1:
        return {"prompt": turns[0]}
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def _list_file(name: str) -> dict[str, Any]:
    return tomllib.loads((LISTS / f"{name}.toml").read_text(encoding="utf-8"))


def _quotable() -> dict[str, list[Any]]:
    """What of the articles and novels can be quoted, in a mixed order."""
    random = Random("passages")
    articles = [
        {"title": _title(**article), "text": _cut(article["text"], LONG), "short": _cut(article["text"], SHORT)}
        for article in _objects(DATA / "wiki.jsonl.xz")
        if not HOLE.search(article["text"])
    ]
    articles = [article for article in articles if len(article["short"]) > LEAST]
    excerpts = []
    for novel in _objects(DATA / "novels.jsonl.xz"):
        if novel["id"] == UNQUOTED:
            continue
        paragraphs = [" ".join(paragraph.split()) for paragraph in novel["text"].split("\n\n")]
        passages = [{"text": _cut(p, LONG), "short": _cut(p, SHORT)} for p in paragraphs if len(p) > 2 * LEAST]
        excerpts += [passage for passage in passages if all(map(_stands_alone, passage.values()))]
    for members in (articles, excerpts):
        random.shuffle(members)
    return {"title": [article["title"] for article in articles], "article": articles, "excerpt": excerpts}


def _title(title: str, text: str) -> str:
    """A title as it is written inside a sentence, by the article's own text."""
    title = re.sub(r" \(.*\)$", "", title)
    inside = title[0].lower() + title[1:]
    if re.search(rf"\b{re.escape(inside)}\b", text):
        title = inside
    article = re.search(rf"\b(an?|the) {re.escape(title)}\b", text[: 40 + len(title)], re.IGNORECASE)
    return f"{article[1].lower()} {title}" if article else title


def _stands_alone(text: str) -> bool:
    """Whether a passage is long enough and what is said in it ends in it."""
    ends = text.count("“") == text.count("”") and text.count('"') % 2 == 0 and not text.startswith(("'", "\u2018"))
    return len(text) > LEAST and ends


def _cut(text: str, longest: int) -> str:
    """The first sentences of a text, as many as fit; none where the first does not."""
    if len(text) <= longest:
        return text
    ends = (end.end() for end in re.finditer(r"[a-z)][.!?]”?(?= [A-Z“])", text[: longest + 2]))
    return text[: max((end for end in ends if not ABBREVIATED.search(text[:end])), default=0)]


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


if __name__ == "__main__":
    (DATA / "prompts.jsonl").write_text(make_prompts(), encoding="utf-8")
