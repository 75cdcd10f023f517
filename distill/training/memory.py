"""Whether this machine can train a draft of some shape."""

from __future__ import annotations

import mlx.core as mx

from distill.training.draft_config import DraftConfig
from kernels.memory import check_fits

LOGIT_BYTES = 256 << 20  # of logits that training computes at a time on a GPU
ACTIVATIONS = 83  # numbers a position that a layer's backward pass keeps, in widths of the draft
SCORES = 6  # the same in rows of attention scores, where they are computed whole


def estimate_memory(
    config: DraftConfig,
    batch: int = 8,
    seq_len: int = 512,
    *,
    gpu: bool = True,
    narrow: bool = True,
    teacher_hidden: int = 0,
    unroll: int = 1,
) -> int:
    """Bytes that training holds at its peak.

    gpu: on a GPU, where work runs ahead of what is freed; narrow: it computes in bfloat16 there; teacher_hidden: width
    of the teacher's embedding if the draft's starts from it, or of the states that it reads, and then unroll is the
    number of steps that it is trained for on its own. An estimate: what is counted for sure are weights,
    gradients and moments; the rest was fitted to drafts of widths 256 and 768 on CPUs, whose resident memory beside
    that of Python is met within an eighth, and to one of 6 layers x 768 with BitNet-2B's vocabulary on an H100.
    """
    tokens = batch * seq_len * (unroll if config.taps else 1)
    embedding = 0 if config.taps else 4 * config.vocab_size * config.hidden
    resident = 4 * config.parameters * 4  # weights, two moments, and the best weights so far
    step_bytes = 4 * config.parameters * 4  # their gradients, and what replaces weights and moments
    activations = tokens * config.layers * ACTIVATIONS * config.hidden
    start = resident // 4 + 2 * embedding + 6 * config.vocab_size * teacher_hidden  # as stored, and as float32
    if gpu:
        activations += tokens * config.layers * SCORES * config.heads * seq_len
        logits = min(LOGIT_BYTES, 4 * tokens * config.head_size)
        peak = resident + step_bytes + activations * (2 if narrow else 4) + 4 * embedding + 8 * logits
    else:  # activations are gone before weights are replaced
        peak = resident + max(4 * activations + 3 * embedding, step_bytes + embedding)
    return max(start, peak)


def is_narrow(dtype: str) -> bool:
    """Whether training with this setting computes in bfloat16 on the present device."""
    return dtype == "bfloat16" or (dtype == "auto" and mx.default_device() == mx.Device(mx.gpu))


def check_memory(
    config: DraftConfig,
    batch: int,
    seq_len: int,
    teacher_hidden: int = 0,
    dtype: str = "auto",
    unroll: int = 1,
    beside: int = 0,
) -> None:
    """Refuse, before anything is allocated, what would not fit. dtype, unroll: the settings; beside: bytes that a
    teacher in memory takes."""
    narrow = is_narrow(dtype)
    # In bfloat16 a CPU computes scores and logits as a GPU does.
    gpu = narrow or mx.default_device() == mx.Device(mx.gpu)
    need = estimate_memory(config, batch, seq_len, gpu=gpu, narrow=narrow, teacher_hidden=teacher_hidden, unroll=unroll)
    need += beside
    size = f"{config.layers} layers x {config.hidden} ({config.parameters / 1e6:,.0f} M parameters)"
    advice = "choose fewer --layers, a smaller --hidden or --batch"
    check_fits(need, f"a draft of {size} needs about {{}} to train", advice)


def disk_bytes(config: DraftConfig) -> int:
    """Bytes that a run has on disk at most: weights and two moments of the last step and of the one before it, the best
    weights of both, in float32. A draft takes the place of a state."""
    return 4 * config.parameters * (2 * 3 + 2)
