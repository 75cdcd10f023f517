"""The teacher answers prompts, many at a time, for a draft to learn from.

A reply's random numbers follow from its own seed, so generation that is killed and run again, in the same batches,
writes the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from decode.metrics import is_looping
from decode.models.cache import KVCache
from decode.models.transformer import Transformer

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
    stride = max(len(prompts) // 8, 1)
    cache = prefill(teacher, [prompt[:-1] for prompt in prompts], max_reply)
    tokens = mx.array([prompt[-1] for prompt in prompts])
    for start in range(0, max_reply, CHECK_EVERY):
        chosen = []
        for i in range(start, min(start + CHECK_EVERY, max_reply)):
            logits = teacher.forward(tokens[:, None], cache).logits
            tokens = sample_tokens(logits, temperature[active], uniform[active, i])
            # On a CPU a step queued behind one that still runs would copy the whole cache.
            (mx.async_eval if teacher.async_decode else mx.eval)(tokens, cache.keys, cache.values)
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
        size = -(-int(writing.sum()) // stride) * stride
        if size < len(active):
            rows = np.sort(np.argsort(~writing, kind="stable")[:size])
            active, writing = active[rows], writing[rows]
            tokens = tokens[mx.array(rows)]
            cache.select(rows)
    return [np.array(reply, np.int32) for reply in written]


def prefill(teacher: Transformer, prompts: list[list[int]], room: int) -> KVCache:
    """A cache that holds a batch of prompts, with room for `room` + 1 more rows each.

    Prompts are padded on the right: their own rows cannot see the padding, and the rows behind a prompt are written
    before they are read.
    """
    longest = max(map(len, prompts))
    padded = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    cache = teacher.new_cache(len(prompts))
    cache.reserve(longest + room + 1)
    if longest:
        teacher.forward(padded, cache)
        mx.eval(cache.keys, cache.values)
    cache.offsets = [len(prompt) for prompt in prompts]
    return cache


def sample_tokens(logits: mx.array, temperature: np.ndarray, uniform: np.ndarray) -> mx.array:
    """A token a row: the distribution inverted at a uniform number, or greedy at temperature 0.

    logits: float32 [s, vocab]; temperature, uniform: float32 [s]. Returns int32 [s].
    """
    divisor = mx.array(temperature)
    p = mx.softmax(logits / mx.maximum(divisor, 1e-3)[:, None], axis=-1)
    below = (mx.cumsum(p, axis=-1) < mx.array(uniform)[:, None]).sum(axis=-1)
    sampled = mx.minimum(below, logits.shape[-1] - 1)
    return mx.where(divisor == 0, mx.argmax(logits, axis=-1), sampled).astype(mx.int32)
