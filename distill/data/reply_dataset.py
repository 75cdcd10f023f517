"""A reply dataset: what is scored, as tokens. The teacher's replies behind their prompts, and the texts beside them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from distill.data import codec
from distill.data.dataset import Reader, Writer
from distill.data.manifest import FORMAT, Entry, Manifest, Omission
from kernels.errors import UserError

EXAMPLES_PER_FILE = 128


@dataclass(frozen=True)
class Example:
    """A prompt with the reply to it, or a text of a source."""

    source: int  # its place among the sources
    number: int  # its place in the seeded order of its source's documents
    tokens: np.ndarray  # int32 [n]: the prompt, then the reply with its end token
    prompt_length: int  # how many of the tokens are the prompt; 0 of a text
    replied: bool  # whether the teacher wrote what is behind the prompt


def _layout(examples: int, tokens: int, vocab_size: int, old: bool) -> codec.Layout:
    number = (np.dtype(np.uint32), (examples,))
    layout: codec.Layout = {
        "tokens": (codec.token_type(vocab_size), (tokens,)),
        "lengths": number,
        "prompt_lengths": number,
        "prompts": number,
    }
    return layout if old else layout | {"sources": number, "replied": (np.dtype(np.uint8), (examples,))}


class ReplyWriter(Writer):
    """Writes examples file by file, so that generation killed at any instant goes on where it was."""

    kind = "replies"

    def check_resumable(self, old: Manifest) -> None:
        """Examples of two orders may not be mixed."""
        if not old.complete and "teacher_files" in self.settings.values.keys() - old.settings.values.keys():
            raise UserError(
                f"{self.folder}: was begun by an older version of bitdraft, which chose prompts in another order; begin"
                " anew in another folder, or delete this one"
            )

    def note_omissions(self, left_out: tuple[Omission, ...]) -> None:
        """Record what of the sources was not used."""
        if self.manifest.left_out != left_out:
            self._write(replace(self.manifest, left_out=left_out))

    def write(self, examples: Sequence[Example], index: int | None = None) -> Entry:
        """Writes examples as file `index`, by default the first that is missing."""
        vocab_size = self.settings.vocab_size
        tokens = np.concatenate([np.zeros(0, np.int32), *(example.tokens for example in examples)])
        if tokens.dtype != np.int32 or (tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size):
            raise ValueError("tokens of replies must be int32 and within the vocabulary")
        if any(not 0 <= example.prompt_length <= len(example.tokens) for example in examples):
            raise ValueError("a reply is shorter than its prompt")
        tensors = {
            "tokens": tokens.astype(codec.token_type(vocab_size)),
            "lengths": np.array([len(example.tokens) for example in examples], np.uint32),
            "prompt_lengths": np.array([example.prompt_length for example in examples], np.uint32),
            "prompts": np.array([example.number for example in examples], np.uint32),
            "sources": np.array([example.source for example in examples], np.uint32),
            "replied": np.array([example.replied for example in examples], np.uint8),
        }
        return self._add(index, tensors, counts_of(examples))


def counts_of(examples: Sequence[Example]) -> dict[str, int]:
    """What a manifest line says of examples."""
    tokens = sum(len(example.tokens) for example in examples)
    answers = tokens - sum(example.prompt_length for example in examples)
    return {"rows": len(examples), "tokens": tokens, "documents": len(examples), "trained_tokens": answers}


class Replies(Reader):
    """A reply dataset opened for reading."""

    kind = "replies"

    def read(self, i: int, verify: bool = True) -> list[Example]:
        """The examples of the i-th listed file. Raises UserError naming a file that is missing or wrong."""
        entry, old = self.shards[i], self.format != FORMAT
        tensors = self._tensors(i, verify)
        self._expect(i, tensors, _layout(entry.rows, entry.tokens, self.settings.vocab_size, old))
        lengths, prompts = tensors["lengths"].astype(np.int64), tensors["prompt_lengths"]
        tokens = tensors["tokens"].astype(np.int32)
        beyond = tokens.size and int(tokens.max()) >= self.settings.vocab_size
        if lengths.sum() != entry.tokens or (prompts > lengths).any() or beyond:
            raise UserError(f"{self.folder / entry.file}: lengths or tokens are impossible")
        parts = np.split(tokens, np.cumsum(lengths)[:-1]) if entry.rows else []
        # Before format 3 a folder held the replies to one source's prompts, and nothing else.
        sources = np.zeros(entry.rows, np.uint32) if old else tensors["sources"]
        replied = np.ones(entry.rows, np.uint8) if old else tensors["replied"]
        columns = zip(sources, tensors["prompts"], parts, prompts, replied, strict=True)
        return [Example(int(s), int(n), part, int(length), bool(r)) for s, n, part, length, r in columns]

    def __iter__(self) -> Iterator[Example]:
        """All examples in order."""
        for i in range(len(self.shards)):
            yield from self.read(i)
