"""What is in a dataset, of shards or of replies, and what is wrong with it."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.data import codec, reply_dataset, shards
from distill.data.codec import Block, SampledBlock
from distill.data.dataset import Reader
from distill.data.manifest import (
    CHANGED,
    MANIFEST,
    SHARD_FILE,
    DamagedManifest,
    Entry,
    Manifest,
    ScoredFrom,
    is_changed,
)
from distill.data.reply_dataset import Replies, ReplyWriter
from distill.data.shards import Dataset, ShardWriter
from kernels.errors import UserError, printable
from kernels.files import real_path, sha256

SAMPLED_SHARDS = 8
# What a manifest's settings say that `distill inspect` shows elsewhere, or only as JSON.
SHOWN_APART = {"teacher", "tokenizer_hash", "chat_template_hash", "teacher_files", "vocab_size", "sources", "exclude"}
OF_SHARDS_APART = {"k", "sampled", "temperatures", "seq_len", "collection_format"}


@dataclass(frozen=True)
class Problem:
    """Something wrong with one file of a dataset. file: its path from the dataset's folder."""

    file: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"


def verify(folder: Path | str, repair: bool = False) -> list[Problem]:
    """Checks every hash, shape and value of a dataset, and of the replies that shards were scored from where they are
    here; an empty list means that all is well.

    `repair` drops what is broken, so that collecting again with the same settings writes it anew, with the bytes it
    had. What is not listed stays: it may be someone's. Raises UserError where there is no dataset to check.
    """
    folder = Path(folder)
    try:
        manifest = Manifest.read(folder, changed=True)
    except DamagedManifest as error:
        return [Problem(MANIFEST, _without(folder / MANIFEST, error))]
    if manifest.kind == "replies":
        return _reply_problems(Replies(folder, manifest), repair)
    dataset = Dataset(folder, manifest)
    wrong, about = _problems(dataset, _shard_faults), _folder_problems(dataset)
    of_replies: list[Problem] = []
    for path, expected in _replies_of(dataset):
        found = _scored(path, expected, repair)
        of_replies += [Problem(os.path.relpath(path / problem.file, folder), problem.message) for problem in found]
    if repair and (wrong or of_replies):
        # A dataset that lacks replies is not whole, even if it has every shard: collecting has work to do.
        with ShardWriter.open(folder, dataset.settings, changed=True) as writer:
            writer.drop(wrong)
    return _flat(wrong) + about + of_replies


def _replies_of(dataset: Dataset) -> Iterator[tuple[Path, ScoredFrom | None]]:
    """The folders of the replies that shards were scored from, those that are here, and what their manifests must be.

    Before format 3 they lay inside the dataset, a folder a source.
    """
    if dataset.format < 3:
        inside = sorted(dataset.folder.glob("replies-*"), key=lambda path: (len(path.name), path.name))
        yield from ((path, None) for path in inside)
    for replies in dataset.scored_from:
        if path := find_replies(dataset.folder, replies):
            yield path, replies


def unchecked(folder: Path | str) -> list[str]:
    """The names of the replies that the shards in a folder were scored from and that are not here, of which `verify`
    says nothing."""
    manifest = Manifest.read(Path(folder), changed=True)
    replies = Dataset(Path(folder), manifest).scored_from if manifest.kind == "shards" else ()
    return [one.name for one in replies if find_replies(Path(folder), one) is None]


def find_replies(folder: Path, replies: ScoredFrom) -> Path | None:
    """Where the replies are that the shards in a folder were scored from: beside it under their own name, or under
    another; None if they are not there."""
    place = real_path(folder).parent  # of the folder itself, be it named as `.` or through a link
    named = place / replies.name
    if named.is_dir():
        return named
    others = (path for path in place.glob(f"*/{MANIFEST}") if path.is_file())
    return next((path.parent for path in others if sha256(path) == replies.sha256), None)


def _scored(path: Path, expected: ScoredFrom | None, repair: bool) -> list[Problem]:
    """What is wrong with replies that shards were scored from."""
    try:
        replies = Replies(path, Manifest.read(path, Replies.kind, changed=True))
    except UserError as error:
        return [Problem(MANIFEST, _without(path / MANIFEST, error))]
    problems = _reply_problems(replies, repair)
    if not problems and expected and replies.complete and sha256(path / MANIFEST) != expected.sha256:
        problems.append(Problem(MANIFEST, "is not the one that the shards were scored from"))
    return problems


def _reply_problems(replies: Replies, repair: bool) -> list[Problem]:
    """What is wrong with a reply dataset, dropped where `repair` says so."""
    wrong, about = _problems(replies, _reply_faults), _folder_problems(replies)
    if wrong and repair:
        with ReplyWriter.open(replies.folder, replies.settings, changed=True) as writer:
            writer.drop(wrong)
    return _flat(wrong) + about


def _problems(reader: Reader, faults: Callable[[Any, int], list[str]]) -> dict[int, list[Problem]]:
    """What is wrong with the files of one folder, by their indices."""
    problems: dict[int, list[Problem]] = {}
    for i, entry in enumerate(reader.shards):
        if found := faults(reader, i):
            problems[entry.index] = [Problem(entry.file, message) for message in found]
    if reader.complete:
        for index in set(range(_total(reader))) - {entry.index for entry in reader.shards}:
            name = Manifest.file_of(reader.kind, index)
            problems[index] = [Problem(name, f"is not listed, though the {reader.kind} are marked complete")]
    return problems


def _total(reader: Reader) -> int:
    """How many files there must be, by the last one."""
    return 1 + max((entry.index for entry in reader.shards), default=-1)


def _folder_problems(reader: Reader) -> list[Problem]:
    """What is wrong beside the listed files: with the manifest, and with files behind the last that it lists. While a
    dataset is not complete, a killed run may have left one."""
    known = {Manifest.file_of(reader.kind, index) for index in range(_total(reader))}
    names = sorted(path.name for path in reader.folder.iterdir()) if reader.complete else []
    problems = [Problem(MANIFEST, CHANGED)] if is_changed((reader.folder / MANIFEST).read_bytes()) else []
    return problems + [
        Problem(name, "is not listed in the manifest; it is not needed, and may be deleted")
        for name in names
        if SHARD_FILE.fullmatch(name) and name not in known
    ]


def _flat(problems: dict[int, list[Problem]]) -> list[Problem]:
    return [problem for index in sorted(problems) for problem in problems[index]]


def _without(path: Path, error: UserError) -> str:
    return str(error).removeprefix(f"{path}: ")


def _shard_faults(dataset: Dataset, i: int) -> list[str]:
    entry, settings = dataset.shards[i], dataset.settings
    try:
        block = dataset.read(i)
    except UserError as error:
        return [_without(dataset.folder / entry.file, error)]
    return codec.faults(block, settings, coded=True) + _miscounted(entry, shards.counts_of(block))


def _reply_faults(replies: Replies, i: int) -> list[str]:
    entry = replies.shards[i]
    try:
        found = replies.read(i)
    except UserError as error:
        return [_without(replies.folder / entry.file, error)]
    return _miscounted(entry, reply_dataset.counts_of(found))


def _miscounted(entry: Entry, counts: dict[str, int]) -> list[str]:
    wrong = [(name, count) for name, count in counts.items() if getattr(entry, name) != count]
    return [f"has {count} {name}, the manifest says {getattr(entry, name)}" for name, count in wrong]


def inspect_dataset(folder: Path | str) -> dict[str, Any]:
    """What is in a dataset, as JSON. Means are over the trained positions of SAMPLED_SHARDS shards.

    Raises UserError if the folder holds no dataset or a file that was read is at fault.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    if manifest.kind == "replies":
        return _inspect_replies(Replies(folder, manifest))
    return _inspect_shards(Dataset(folder, manifest))


def _inspect_shards(dataset: Dataset) -> dict[str, Any]:
    settings, listed = dataset.settings, dataset.shards
    picked = sorted(set(np.linspace(0, len(listed) - 1, min(SAMPLED_SHARDS, len(listed))).astype(int).tolist()))
    sums, count = np.zeros(4), 0
    for i in picked:
        block = dataset.read(i)
        p = _probabilities(block)
        # What is left as one bucket: merging outcomes never raises the entropy, so this is a lower bound. Draws have
        # nothing left, and the entropy of their counts is on average below the teacher's too.
        tail = np.clip(1 - p.sum(axis=1), 0, 1)
        parts = np.concatenate([p, tail[:, None]], axis=1)
        entropy = -(parts * np.log(np.where(parts > 0, parts, 1))).sum()
        sums += p[:, 0].sum(), tail.sum(), entropy, np.count_nonzero(p)
        count += len(p)
    means = (sums / count).tolist() if count else [None] * 4
    of_draws = settings.sampled is not None
    return _summary(
        dataset,
        {
            "k": None if of_draws else settings.k,
            "sampled": settings.sampled,
            "temperatures": list(settings.temperatures),
            "seq_len": settings.seq_len,
        },
        {
            "sampled_shards": len(picked),
            "mean_top1_probability": means[0],
            "mean_tail_mass": None if of_draws else means[1],
            "mean_entropy_at_least_nats": means[2],
            "mean_different_ids": means[3] if of_draws else None,
            "replies": [_where(dataset, replies) for replies in dataset.scored_from],
            **_by_kind(dataset),
        },
    )


def _probabilities(block: Block | SampledBlock) -> np.ndarray:
    """Of the ids that are kept at the trained positions, the first choice first, float64 [n, ids]; estimates from
    draws."""
    if isinstance(block, SampledBlock):
        counts = block.counts[block.loss_mask].astype(np.float64)
        return counts / counts.sum(axis=1, keepdims=True)
    return np.exp(block.top_logprobs[block.loss_mask].astype(np.float64))


def _where(dataset: Dataset, replies: ScoredFrom) -> dict[str, Any]:
    found = find_replies(dataset.folder, replies)
    manifest = found and found / MANIFEST
    differs = manifest is not None and not (manifest.is_file() and sha256(manifest) == replies.sha256)
    where = str(found) if found else None
    return {"name": replies.name, "sha256": replies.sha256, "folder": where, "differs": differs}


def _by_kind(dataset: Dataset) -> dict[str, Any]:
    """What the replies say that shards were scored from; nothing where they are not here."""
    for scored in dataset.scored_from:
        where = _where(dataset, scored)
        if where["folder"] and not where["differs"]:
            counts = _counts(Replies.open(where["folder"]))
            return {name: counts[name] for name in ("by_source", "by_kind")}
    return {}


def _inspect_replies(replies: Replies) -> dict[str, Any]:
    omissions = {"left_out": list(map(vars, replies.left_out)), "cut": list(map(vars, replies.cut))}
    return _summary(replies, {}, {**_counts(replies), "sha256": sha256(replies.folder / MANIFEST), **omissions})


def _counts(replies: Replies) -> dict[str, Any]:
    """How much of a reply dataset is of which source and of which kind, replied to, and longer than a row."""
    figures = ("documents", "replied", "tokens", "trained_tokens")
    of_sources, of_kinds = dict[int, np.ndarray](), dict[str, np.ndarray]()
    split, seq_len = 0, replies.settings.values.get("seq_len", np.inf)
    for one in replies:
        split += len(one.tokens) > seq_len
        more = np.array([1, one.replied, len(one.tokens), np.count_nonzero(one.trained)])
        of_sources[one.source] = of_sources.get(one.source, 0) + more
        of_kinds[one.kind] = of_kinds.get(one.kind, 0) + more
    named = dict(enumerate(replies.settings.values.get("sources", [])))

    def row(what: str, name: Any, counts: np.ndarray) -> dict[str, Any]:
        return {what: name, **dict(zip(figures, counts.tolist(), strict=True))}

    return {
        "examples_replied": sum(int(counts[1]) for counts in of_sources.values()),
        "split": split,
        "by_source": [row("source", _source(named.get(i, i))[0], of_sources[i]) for i in sorted(of_sources)],
        "by_kind": [row("kind", name or None, of_kinds[name]) for name in sorted(of_kinds)],
    }


def _summary(reader: Reader, first: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    listed, settings = reader.shards, reader.settings
    tokens = reader.tokens
    trained = sum(entry.trained_tokens for entry in listed)
    size = sum(entry.bytes for entry in listed) + (reader.folder / MANIFEST).stat().st_size
    return {
        "folder": str(reader.folder),
        "kind": reader.kind,
        "format": reader.format,
        "complete": reader.complete,
        "machine": reader.machine or None,
        "teacher": settings.values["teacher"],
        "vocab_size": settings.vocab_size,
        **first,
        "shards": len(listed),
        "rows": sum(entry.rows for entry in listed),
        "tokens": tokens,
        "trained_tokens": trained,
        "trained_share": trained / tokens if tokens else None,
        "documents": sum(entry.documents for entry in listed),
        "bytes": size,
        "bytes_per_token": size / tokens if tokens else None,
        **last,
        "sources": settings.values.get("sources", []),
        "settings": settings.values,
    }


def table(summary: dict[str, Any]) -> str:
    """What `inspect_dataset` found, for people."""
    of_shards = summary["kind"] == "shards"
    teacher, settings = summary["teacher"], summary["settings"]
    whole = "complete" if summary["complete"] else "NOT complete"
    machine = summary["machine"]
    share = "" if summary["trained_share"] is None else f" ({summary['trained_share']:.1%})"
    holds = ("logits" if summary["sampled"] is None else "draws") if of_shards else "replies"
    lines = [
        ("holds", f"{holds}, {whole}, format {summary['format']}"),
        ("teacher", f"{teacher['name']}, sha256 {teacher['hash'][:12]}, vocabulary of {summary['vocab_size']:,}"),
        *([("begun on", ", ".join(f"{name} {value}" for name, value in machine.items()))] if machine else []),
        ("tokens", f"{summary['tokens']:,} in {_count(summary['documents'], 'segment' if of_shards else 'document')}"),
        ("trained on", f"{summary['trained_tokens']:,}{share}"),
    ]
    if of_shards:
        kept = f"top {summary['k']} logits, log-sum-exps at temperature {_joined(summary['temperatures'])}"
        if summary["sampled"] is not None:
            kept = f"{_count(summary['sampled'], 'draw')} from the teacher's distribution where it is trained on"
        lines += [
            ("rows", f"{summary['rows']:,} of {summary['seq_len']:,} tokens, in {_count(summary['shards'], 'shard')}"),
            ("kept", kept),
        ]
    else:
        lines.append(("replied to", f"{_count(summary['examples_replied'], 'document')}; the others are as they were"))
        if summary["split"]:
            lines.append(
                ("split", f"{_count(summary['split'], 'document')}, longer than a row of {settings['seq_len']:,}")
            )
    each = "" if summary["bytes_per_token"] is None else f", {summary['bytes_per_token']:.1f} bytes a token"
    lines.append(("size", f"{summary['bytes'] / 1e6:,.1f} MB{each}"))
    if summary.get("mean_top1_probability") is not None:
        lines += [
            ("first choice", f"probability {summary['mean_top1_probability']:.3f} on average"),
            ("outside the top", f"probability {summary['mean_tail_mass']:.4f} on average")
            if summary["sampled"] is None
            else ("different ids", f"{summary['mean_different_ids']:.1f} drawn on average"),
            ("entropy", f"at least {summary['mean_entropy_at_least_nats']:.3f} nats on average"),
        ]
    for replies in summary.get("replies", []):
        where = replies["folder"] or f"{replies['name']}, which is not here"
        other = ", and what is there now is another" if replies["differs"] else ""
        lines.append(("scored from", f"{where} (sha256 {replies['sha256'][:12]}{other})"))
    text = f"{printable(summary['folder'])}\n\n{_columns(lines)}"
    for title, name in (("sources", "sources"), ("prompts left out", "exclude")):
        if rows := [_source(entry) for entry in settings.get(name) or []]:
            text += f"\n\n{title}\n{_columns(rows)}"
    # Of shards too these are the replies' counts, ends that are too short for a row among them.
    counted = "tokens of the replies" if of_shards else "tokens"
    for by, what in (("by_source", "source"), ("by_kind", "kind")):
        title, counts = f"{counted} by {what}", summary.get(by, [])
        if any(one[what] is not None for one in counts):
            shares = [_share(one, what, sum(x["tokens"] for x in counts)) for one in counts]
            text += f"\n\n{title}\n{_columns(shares)}"
    for title, omissions in (("left out of the sources", "left_out"), ("conversations that were cut", "cut")):
        found = summary.get(omissions, [])
        if rows := [(one["source"], f"{one['count']:,}", one["reason"], one["first"]) for one in found]:
            text += f"\n\n{title}\n{_columns(rows)}"
    apart = SHOWN_APART | OF_SHARDS_APART if of_shards else SHOWN_APART
    others = [(name, _joined(value)) for name, value in settings.items() if name not in apart]
    return text + (f"\n\nsettings\n{_columns(others)}" if others else "")


def _share(one: dict[str, Any], what: str, tokens: int) -> tuple[str, ...]:
    """A line of what is of one source or kind."""
    share = one["tokens"] / tokens if tokens else 0
    of = f"{_count(one['documents'], 'document')}, {one['replied']:,} replied to"
    return one[what] or "of no kind", f"{one['tokens']:,}", f"{share:.1%}", f"{one['trained_tokens']:,} trained on", of


def _source(entry: Any) -> tuple[str, ...]:
    """Name, kind, and hash or commit of a source, shortened."""
    values = entry if isinstance(entry, dict) else {"name": entry}
    commit = values.get("commit")
    which = f"commit {str(commit)[:12]}" if commit else f"sha256 {str(values.get('sha256', '?'))[:12]}"
    if values.get("kind") == "self":
        which = "what the teacher says to itself"
    return str(values.get("name", "?")), str(values.get("kind", "")), which


def _columns(rows: Iterable[tuple[str, ...]]) -> str:
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _joined(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_joined, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
