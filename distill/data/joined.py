"""Several datasets of one teacher, read as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distill.data.codec import Block, SampledBlock
from distill.data.manifest import DatasetSettings, Entry
from distill.data.shards import Dataset
from kernels.errors import UserError
from kernels.files import json_hash


class Datasets:
    """The shards of one or more datasets, one dataset's after the other's."""

    def __init__(self, parts: Sequence[Dataset]) -> None:
        """UserError naming a dataset that does not go with the first, and why, or one that is there twice."""
        self.parts = tuple(parts)
        self._places = [(part, i) for part in self.parts for i in range(len(part.shards))]
        for part in self.parts[1:]:
            for what, hashed in (("teacher", True), ("tokenizer", True), ("seq_len", False), ("k", False),
                                 ("sampled", False), ("temperatures", False)):  # fmt: skip
                if hashed:
                    was, now = (getattr(one.settings, f"{what}_hash") for one in (self, part))
                else:  # of draws there is no k, of logits no number of draws
                    was, now = (one.settings.values.get(what) for one in (self, part))
                if was != now:
                    shown = "" if hashed else f" ({now or 'none'}, not {was or 'none'})"
                    raise UserError(f"{part.folder}: has another {what}{shown} than {self.parts[0].folder}")
        for i, part in enumerate(self.parts):
            if part.sha256 in {earlier.sha256 for earlier in self.parts[:i]}:
                raise UserError(f"{part.folder}: is there twice")

    @classmethod
    def open(cls, folders: Sequence[Path]) -> Datasets:
        return cls([Dataset.open(folder) for folder in folders])

    @property
    def folder(self) -> Path:
        """The first one's."""
        return self.parts[0].folder

    @property
    def settings(self) -> DatasetSettings:
        """The first one's; of another teacher, length, number of logits or temperatures none is."""
        return self.parts[0].settings

    @property
    def shards(self) -> list[Entry]:
        return [part.shards[i] for part, i in self._places]

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    @property
    def sha256(self) -> str:
        """Of the manifest, or of the manifests' hashes where there are several."""
        hashes = [part.sha256 for part in self.parts]
        return hashes[0] if len(hashes) == 1 else json_hash(hashes)

    def read(self, i: int, verify: bool = True) -> Block | SampledBlock:
        """As `Dataset.read`."""
        part, index = self._places[i]
        return part.read(index, verify)

    def read_text(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `Dataset.read_text`."""
        part, index = self._places[i]
        return part.read_text(index)
