"""The teacher answers prompts, many at a time, for a draft to learn from.

A reply's random numbers follow from its own seed, so generation that is killed and run again, in the same batches,
writes the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from decode.metrics import is_looping
from decode.models.transformer import CACHE_STEP, Transformer

CHECK_EVERY = 16
LONGEST_LOOP = 16  # tokens; another value writes other replies, and so needs another `manifest.FORMAT`


def generate_replies(
    teacher: Transformer,
    prompts: list[list[int]],
    seeds: Sequence[tuple[int, ...]],
    *,
    temperatures: list[float],
    max_reply: int,
    end_tokens: frozenset[int],
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[np.ndarray]:
    """Replies to a batch of prompts, each int32 [at most max_reply], end token included.

    seeds: of each prompt's random numbers; temperatures: one a prompt, 0 is greedy. A reply that has fallen into a loop
    is cut there: nothing is learnt from its repetitions. `advance` is told how many tokens were written.
    """
    written: list[list[int]] = [[] for _ in prompts]
    uniform = np.stack([np.random.default_rng(seed).random(max_reply, np.float32) for seed in seeds])
    temperature = np.array(temperatures, np.float32)
    # The prompt that each row of the batch answers, and whether it is still writing.
    active = np.arange(len(prompts))
    writing = np.ones(len(prompts), bool)
    step = max(len(prompts) // 8, 1)
    keys, values = prefill(teacher, [prompt[:-1] for prompt in prompts], max_reply)
    tokens = mx.array([prompt[-1] for prompt in prompts])
    positions = mx.array([len(prompt) - 1 for prompt in prompts])
    for start in range(0, max_reply, CHECK_EVERY):
        chosen = []
        for i in range(start, min(start + CHECK_EVERY, max_reply)):
            logits = teacher.batch_step(tokens, positions, keys, values)
            tokens = sample_tokens(logits, temperature[active], uniform[active, i])
            positions = positions + 1
            mx.async_eval(tokens, positions, keys, values)
            chosen.append(tokens)
        for row, (reply, fresh) in enumerate(zip(active, np.array(mx.stack(chosen, axis=1)).tolist(), strict=True)):
            if not writing[row]:
                continue
            end = next((j + 1 for j, token in enumerate(fresh) if token in end_tokens), None)
            written[reply] += fresh[:end]
            advance(len(fresh[:end]))
            writing[row] = end is None and not is_looping(written[reply], LONGEST_LOOP)
        if not writing.any():
            break
        # Finished rows are dropped, but in steps: each new batch size can cost a GPU a new plan.
        size = -(-int(writing.sum()) // step) * step
        if size < len(active):
            rows = np.sort(np.argsort(~writing, kind="stable")[:size])
            active, writing = active[rows], writing[rows]
            tokens, positions = tokens[mx.array(rows)], positions[mx.array(rows)]
            keys, values = [key[mx.array(rows)] for key in keys], [value[mx.array(rows)] for value in values]
    return [np.array(reply, np.int32) for reply in written]


def prefill(teacher: Transformer, prompts: list[list[int]], room: int) -> tuple[list[mx.array], list[mx.array]]:
    """Caches that hold a batch of prompts, with room for `room` + 1 more rows each.

    Prompts are padded on the right: their own rows cannot see the padding, and the rows
    after a prompt are written before they are read. Returns a layer's float32 [s, kv_heads,
    capacity, head_dim] each.
    """
    longest = max(map(len, prompts))
    capacity = -(-(longest + room + 1) // CACHE_STEP) * CACHE_STEP
    padded = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    keys, values = teacher.batch_prefill(padded)
    spare = mx.zeros((len(prompts), keys[0].shape[1], capacity - longest, keys[0].shape[3]))
    return (
        [mx.concatenate([key, spare], axis=2) for key in keys],
        [mx.concatenate([value, spare], axis=2) for value in values],
    )


def sample_tokens(logits: mx.array, temperature: np.ndarray, uniform: np.ndarray) -> mx.array:
    """A token a row: the distribution inverted at a uniform number, or greedy at temperature 0.

    logits: float32 [s, vocab]; temperature, uniform: float32 [s]. Returns int32 [s].
    """
    divisor = mx.array(temperature)
    p = mx.softmax(logits / mx.maximum(divisor, 1e-3)[:, None], axis=-1)
    below = (mx.cumsum(p, axis=-1) < mx.array(uniform)[:, None]).sum(axis=-1)
    sampled = mx.minimum(below, logits.shape[-1] - 1)
    return mx.where(divisor == 0, mx.argmax(logits, axis=-1), sampled).astype(mx.int32)
