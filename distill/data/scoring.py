"""The third pass of a collection: rows are scored by the teacher into its top k logits and its log-sum-exps, or into
ids drawn from its distribution.

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
from distill.data.codec import Block, SampledBlock
from distill.data.draws import draw, draw_on_host, tally, uniforms
from distill.data.packing import Row
from distill.data.settings import ScoringSettings
from kernels.errors import UserError
from kernels.memory import check_fits

LOGIT_ROWS = 512  # whose logits are there at the same time


@dataclass(frozen=True)
class Scorer:
    """A teacher, and what is kept of its logits.

    top_k: of each position, and log-sum-exps at the temperatures; or None, and the number of ids drawn is in `sampled`,
    by random numbers that follow from the seed. batch: rows scored at a time; advance: told of tokens scored.
    """

    model: Transformer
    top_k: int | None
    temperatures: tuple[float, ...]
    batch: int
    advance: Callable[[int], None] = lambda tokens: None
    sampled: int = 0
    seed: int = 0

    def score(self, rows: list[Row], first: int = 0) -> Block | SampledBlock:
        """What the teacher predicts at every position of rows. first: the number of the first of them in the dataset,
        which random numbers follow from. UserError where a logit is not finite."""
        return self.start(rows, first)()

    def start(self, rows: list[Row], first: int = 0) -> Callable[[], Block | SampledBlock]:
        """As `score`, which a GPU is given to do; the block is what the result returns, when it is done."""
        parts = []
        for i in range(0, len(rows), self.batch):
            tokens, mask, segments = (np.stack(column) for column in zip(*rows[i : i + self.batch], strict=True))
            scored = self._score_batch(tokens, segments, first + i)
            mx.async_eval(scored)
            if not self.model.async_decode:  # what is queued on a CPU holds its memory until it has run
                mx.eval(scored)
                self.advance(int(np.count_nonzero(segments)))
            parts.append((tokens, mask, segments, scored))

        def finish() -> Block | SampledBlock:
            blocks = []
            for tokens, mask, segments, scored in parts:
                ids, kept, lse = (np.array(mx.concatenate(list(column))) for column in zip(*scored, strict=True))
                if self.model.async_decode:
                    self.advance(int(np.count_nonzero(segments)))
                self._check(lse.reshape(*tokens.shape, -1), segments)
                columns: tuple[np.ndarray, ...]
                if self.top_k is None:
                    columns = tally(ids[:, 0].astype(np.int32), kept, mask.ravel())
                else:
                    columns = (ids.astype(np.int32), kept - lse[:, :1], lse)
                blocks.append((tokens, mask, segments, *(column.reshape(*tokens.shape, -1) for column in columns)))
            kind = SampledBlock if self.top_k is None else Block
            return kind(*(np.concatenate(column) for column in zip(*blocks, strict=True)))

        return finish

    def _score_batch(
        self, tokens: np.ndarray, segments: np.ndarray, first: int
    ) -> list[tuple[mx.array, mx.array, mx.array]]:
        """Of chunks of all positions, not evaluated on a GPU: the top and the log-sum-exps (kernels.ops, `top_k`), or
        the first choice, the draws, and the log-sum-exp at temperature 1."""
        last = len(self.model.layers) - 1
        flat = self.model.normed(self.model.forward(tokens, Packed(segments), taps=[last]).hidden[last])
        chunks = [slice(start, start + LOGIT_ROWS) for start in range(0, len(flat), LOGIT_ROWS)]
        if self.top_k is not None:
            return [self.model.ops.top_k(self.model.logits(flat[at]), self.top_k, self.temperatures) for at in chunks]
        rows, seq_len = tokens.shape
        uniform = np.concatenate([uniforms(self.seed, first + i, seq_len, self.sampled) for i in range(rows)])
        return [self._draw(self.model.logits(flat[at]), uniform[at]) for at in chunks]

    def _draw(self, logits: mx.array, uniform: np.ndarray) -> tuple[mx.array, mx.array, mx.array]:
        first, _, lse = self.model.ops.top_k(logits, 1, (1.0,))
        if self.model.async_decode:
            return first, draw(logits, lse, mx.array(uniform)), lse
        return first, mx.array(draw_on_host(np.array(logits, copy=False), uniform)), lse

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


def bytes_per_token(vocab_size: int, settings: ScoringSettings) -> int:
    """Stored bytes a position, rounded up (docs/shards.md); of draws the most, if no id were drawn twice."""
    id_width = (vocab_size - 1).bit_length()
    if settings.sampled is not None:
        bits, rest = (settings.sampled + 1) * (id_width + settings.sampled.bit_length()), 1
    else:
        assert settings.top_k is not None
        bits, rest = settings.top_k * (id_width + 12), 4 * len(settings.temperatures)
    return -(-bits // 8) + (2 if vocab_size <= 1 << 16 else 4) + rest + 2
