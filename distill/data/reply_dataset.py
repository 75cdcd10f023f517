"""A reply dataset: what is scored, as tokens. Conversations with the teacher's replies, and the texts beside them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from distill.data import codec
from distill.data.dataset import Coded, Reader, Writer
from distill.data.manifest import FORMAT, Entry, Omission
from kernels.errors import UserError, first_line
from kernels.files import check_file

EXAMPLES_PER_FILE = 128


@dataclass(frozen=True)
class Example:
    """A conversation with the teacher's replies, or what a source has as it is."""

    source: int  # its place among the sources
    number: int  # its place in the seeded order of its source's documents
    tokens: np.ndarray  # int32 [n]
    trained: np.ndarray  # bool [n]: which of them are learnt; those of replies, with their end tokens
    replied: bool  # whether the teacher wrote what is learnt
    kind: str = ""  # what its source calls it: one line, empty where that says nothing

    def first(self, tokens: int) -> "Example":
        """Its beginning."""
        return replace(self, tokens=self.tokens[:tokens], trained=self.trained[:tokens])


class ReplyWriter(Writer):
    """Writes examples file by file, so that generation killed at any instant goes on where it was."""

    kind = "replies"

    def note_omissions(self, left_out: tuple[Omission, ...], cut: tuple[Omission, ...]) -> None:
        """Record what of the sources was not used, and which conversations were cut."""
        if (self.manifest.left_out, self.manifest.cut) != (left_out, cut):
            self._write(replace(self.manifest, left_out=left_out, cut=cut))

    def write(self, examples: Sequence[Example], index: int | None = None, device: str = "") -> Entry:
        """Writes examples as file `index`, by default the first that is missing."""
        vocab_size = self.settings.vocab_size
        tokens = np.concatenate([np.zeros(0, np.int32), *(example.tokens for example in examples)])
        trained = np.concatenate([np.zeros(0, bool), *(example.trained for example in examples)])
        if tokens.dtype != np.int32 or (tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size):
            raise ValueError("tokens of replies must be int32 and within the vocabulary")
        if any(len(example.trained) != len(example.tokens) for example in examples):
            raise ValueError("it must be said of each token whether it is learnt")
        names = sorted({example.kind for example in examples})
        tensors = {
            "tokens": tokens.astype(codec.token_type(vocab_size)),
            "trained": np.packbits(trained, bitorder="little"),
            "lengths": np.array([len(example.tokens) for example in examples], np.uint32),
            "prompts": np.array([example.number for example in examples], np.uint32),
            "sources": np.array([example.source for example in examples], np.uint32),
            "replied": np.array([example.replied for example in examples], np.uint8),
            "kinds": np.array([names.index(example.kind) for example in examples], np.uint8),
            "kind_names": np.frombuffer("\n".join(names).encode(), np.uint8),
        }
        return self.add(Coded.of(tensors, counts_of(examples), device), index)


def counts_of(examples: Sequence[Example]) -> dict[str, int]:
    """What a manifest line says of examples."""
    return {
        "rows": len(examples),
        "tokens": sum(len(example.tokens) for example in examples),
        "documents": len(examples),
        "trained_tokens": sum(int(np.count_nonzero(example.trained)) for example in examples),
    }


class Replies(Reader):
    """A reply dataset opened for reading."""

    kind = "replies"

    def read(self, i: int, verify: bool = True) -> list[Example]:
        """The examples of the i-th listed file. Raises UserError naming a file that is missing or wrong."""
        entry, tensors = self.shards[i], self._tensors(i, verify)
        self._expect(i, tensors, self._layout(entry, len(tensors.get("kind_names", ()))))
        tokens, lengths = tensors["tokens"].astype(np.int32), tensors["lengths"].astype(np.int64)
        if lengths.sum() != entry.tokens or (tokens.size and int(tokens.max()) >= self.settings.vocab_size):
            raise UserError(f"{self.folder / entry.file}: lengths or tokens are impossible")
        # Before format 3 a folder held the replies to one source's prompts, and nothing else.
        sources = tensors["sources"] if self.format >= 3 else np.zeros(entry.rows, np.uint32)
        replied = tensors["replied"] if self.format >= 3 else np.ones(entry.rows, np.uint8)
        if self.format == FORMAT:
            trained = np.unpackbits(tensors["trained"], count=entry.tokens, bitorder="little").view(np.bool_)
            kinds = self._kinds(i, tensors["kinds"], tensors["kind_names"])
        else:  # what stands behind the prompt
            starts, prompts = np.cumsum(lengths) - lengths, tensors["prompt_lengths"].astype(np.int64)
            if (prompts > lengths).any():
                raise UserError(f"{self.folder / entry.file}: lengths or tokens are impossible")
            trained = np.arange(entry.tokens) >= np.repeat(starts + prompts, lengths)
            kinds = [""] * entry.rows
        ends = np.cumsum(lengths)[:-1]
        parts = zip(np.split(tokens, ends), np.split(trained, ends), strict=True) if entry.rows else ()
        columns = zip(sources, tensors["prompts"], parts, replied, kinds, strict=True)
        return [Example(int(s), int(n), *part, bool(r), kind) for s, n, part, r, kind in columns]

    def tokens_at(self, i: int, start: int, count: int) -> np.ndarray:
        """Some tokens of the i-th listed file, int32 [count], its hash taken on trust."""
        path, dtype = self.folder / self.shards[i].file, codec.token_type(self.settings.vocab_size)
        check_file(path)
        try:
            with path.open("rb") as file:
                header = int.from_bytes(file.read(8), "little")
                begin = json.loads(file.read(header))["tokens"]["data_offsets"][0]
                file.seek(8 + header + begin + start * dtype.itemsize)
                tokens = np.frombuffer(file.read(count * dtype.itemsize), dtype).astype(np.int32)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}: cannot be read any more ({first_line(error)})") from None
        if len(tokens) != count:
            raise UserError(f"{path}: became shorter while it was read")
        return tokens

    def _layout(self, entry: Entry, kind_names: int) -> codec.Layout:
        """kind_names: their bytes, which only the file itself says."""
        number, byte = (np.dtype(np.uint32), (entry.rows,)), np.dtype(np.uint8)
        layout: codec.Layout = {
            "tokens": (codec.token_type(self.settings.vocab_size), (entry.tokens,)),
            "lengths": number,
            "prompts": number,
        }
        if self.format >= 3:
            layout |= {"sources": number, "replied": (byte, (entry.rows,))}
        if self.format < FORMAT:
            return layout | {"prompt_lengths": number}
        return layout | {
            "trained": (byte, (-(-entry.tokens // 8),)),
            "kinds": (byte, (entry.rows,)),
            "kind_names": (byte, (kind_names,)),
        }

    def _kinds(self, i: int, kinds: np.ndarray, kind_names: np.ndarray) -> list[str]:
        try:
            names = kind_names.tobytes().decode().split("\n")
            return [names[kind] for kind in kinds]
        except (UnicodeDecodeError, IndexError):
            raise UserError(f"{self.folder / self.shards[i].file}: kinds are impossible") from None

    def __iter__(self) -> Iterator[Example]:
        """All examples in order."""
        for i in range(len(self.shards)):
            yield from self.read(i)
