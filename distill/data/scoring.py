"""The third pass of a collection: rows are scored by the teacher into its top k logits and its log-sum-exps.

Which rows are scored together follows from the settings, so that bits do too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from decode.models.cache import Packed
from decode.models.transformer import Transformer
from distill.data.codec import Block
from distill.data.packing import Row
from kernels.errors import UserError
from kernels.memory import check_fits

LOGIT_ROWS = 512  # whose logits are there at the same time


@dataclass(frozen=True)
class Scorer:
    """A teacher, and what is kept of its logits. batch: rows scored at a time; advance: told of tokens scored."""

    model: Transformer
    top_k: int
    temperatures: tuple[float, ...]
    batch: int
    advance: Callable[[int], None] = lambda tokens: None

    def score(self, rows: list[Row]) -> Block:
        """What the teacher predicts at every position of rows. UserError where a logit is not finite."""
        return self.start(rows)()

    def start(self, rows: list[Row]) -> Callable[[], Block]:
        """As `score`, which a GPU is given to do; the block is what the result returns, when it is done."""
        parts = []
        for i in range(0, len(rows), self.batch):
            tokens, mask, segments = (np.stack(column) for column in zip(*rows[i : i + self.batch], strict=True))
            scored = self._score_batch(tokens, segments)
            mx.async_eval(scored)
            if not self.model.async_decode:  # what is queued on a CPU holds its memory until it has run
                mx.eval(scored)
                self.advance(int(np.count_nonzero(segments)))
            parts.append((tokens, mask, segments, scored))

        def finish() -> Block:
            blocks = []
            for tokens, mask, segments, scored in parts:
                ids, top, lse = (np.array(mx.concatenate(list(column))) for column in zip(*scored, strict=True))
                if self.model.async_decode:
                    self.advance(int(np.count_nonzero(segments)))
                self._check(lse.reshape(*tokens.shape, -1), segments)
                columns = (ids.astype(np.int32), top - lse[:, :1], lse)
                blocks.append((tokens, mask, segments, *(column.reshape(*tokens.shape, -1) for column in columns)))
            return Block(*(np.concatenate(column) for column in zip(*blocks, strict=True)))

        return finish

    def _score_batch(self, tokens: np.ndarray, segments: np.ndarray) -> list[tuple[mx.array, mx.array, mx.array]]:
        """The top and the log-sum-exps of chunks of all positions (kernels.ops, `top_k`), not evaluated."""
        last = len(self.model.layers) - 1
        flat = self.model.normed(self.model.forward(tokens, Packed(segments), taps=[last]).hidden[last])
        return [
            self.model.ops.top_k(self.model.logits(flat[start : start + LOGIT_ROWS]), self.top_k, self.temperatures)
            for start in range(0, len(flat), LOGIT_ROWS)
        ]

    def _check(self, lse: np.ndarray, segments: np.ndarray) -> None:
        wrong = np.argwhere(~np.isfinite(lse).all(axis=-1) & (segments != 0))
        if len(wrong):
            row, position = wrong[0]
            raise UserError(
                f"the teacher's logits are not finite (at token {position} of row {row} of those scored together)"
            )


def check_memory(config: dict[str, Any], batch: int, seq_len: int) -> None:
    """UserError where the rows of a batch do not fit: counted are states and the feed-forward layer of one layer, in
    float32, and one head's attention scores."""
    widths = 4 * config["hidden_size"] + 2 * config.get("intermediate_size", 0)
    need = 4 * batch * seq_len * (widths + seq_len)
    what = f"--batch {batch}: scoring so many rows of {seq_len} tokens needs about {{}}"
    check_fits(need, what, "choose a smaller --batch or --seq-len")


def bytes_per_token(vocab_size: int, top_k: int, temperatures: int) -> int:
    """Stored bytes a position, rounded up (docs/shards.md)."""
    bits = top_k * ((vocab_size - 1).bit_length() + 12)
    return -(-bits // 8) + (2 if vocab_size <= 1 << 16 else 4) + 4 * temperatures + 2
