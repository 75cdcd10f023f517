"""How fast a whole model takes steps of 1..8 rows, and prefills: verify(K + 1) against decode(1).

    python -m benchmarks.whole_model 2b --head int8 --layers 30 --draft 6x768
    python -m benchmarks.whole_model checkpoints/bitnet-smol-43m

`2b` is a model of BitNet-2B's shape with random ternary weights, made in memory. Every number of rows is
measured in turn, round after round, and medians are reported; a step ends when its choice of tokens is on
the host, as in decoding. The bandwidth is measured in the same run, and what `decode plan` predicts from it
stands beside what was measured. With --draft, a step of a random draft of that size is measured too, and
speed-ups for an acceptance of 0.7 are those of the measured costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import bitnet, llama

from benchmarks.standin import BITNET_2B, random_codes
from decode.checkpoint import find_teacher
from decode.model import KVCache, Transformer
from decode.plan import Costs, draft_bytes, teacher_bytes, tokens_per_verification
from decode.sampling import greedy_tokens
from decode.shape import Shape
from kernels import BitLinear
from kernels.backends import device_backend
from kernels.bandwidth import Bandwidth, CpuReader, GpuReader
from kernels.device import device_name, processors

STREAMED = 1 << 29  # bytes: far more than caches hold
ACCEPTANCE = 0.7  # for the speed-ups


def random_bitnet(config: dict[str, Any], seed: int = 0) -> Any:
    """An mlx-lm `bitnet` model with random ternary weights and a random bfloat16 embedding."""
    rng = np.random.default_rng(seed)
    model = bitnet.Model(bitnet.ModelArgs.from_dict(config))
    for i, block in enumerate(model.layers):
        for parent, name in [
            *((block.self_attn, f"{p}_proj") for p in "qkvo"),
            *((block.mlp, f"{p}_proj") for p in ("gate", "up", "down")),
        ]:
            old = getattr(parent, name)
            codes = random_codes(rng, old.out_features, old.in_features)
            setattr(
                parent,
                name,
                BitLinear(mx.array(codes), mx.array([1.0]), invert_scale=False, name=f"layers.{i}.{name}"),
            )
    rows = rng.normal(0, 0.02, (4096, config["hidden_size"])).astype(np.float32)
    repeated = mx.repeat(mx.array(rows).astype(mx.bfloat16), -(-config["vocab_size"] // 4096), axis=0)
    model.model.embed_tokens.weight = repeated[: config["vocab_size"]]
    return model


def random_draft(teacher: Transformer, size: str) -> Transformer:
    """A draft of `LAYERSxHIDDEN` for a teacher, with random weights, as it decodes: all int8."""
    layers, hidden = (int(part) for part in size.split("x"))
    shape = Shape.of_draft(
        layers, hidden, kv_ratio=teacher.shape.kv_heads / teacher.shape.heads, vocab=teacher.vocab_size
    )
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": 1e-5,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    return Transformer(model, config, "int8", "int8")


def read_bandwidth() -> Bandwidth:
    """The fastest reading of memory here, with all processors or on the GPU."""
    if device_backend() == "cpu":
        return CpuReader(STREAMED).measure(processors())
    return GpuReader(STREAMED).measure()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="2b, or a checkpoint's folder")
    parser.add_argument("--layers", type=int, default=30, help="layers of the random model")
    parser.add_argument("--head", choices=("float", "int8"), default="float")
    parser.add_argument("--draft", metavar="LAYERSxHIDDEN", help="also measure a draft of this size")
    parser.add_argument("--rows", default="1,2,4,5,8")
    parser.add_argument("--context", type=int, default=128, help="tokens in the cache while measuring")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--prefill", type=int, default=128, help="tokens of the prompt whose prefill is timed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    if options.model == "2b":
        config = BITNET_2B | {"num_hidden_layers": options.layers}
        model = Transformer(random_bitnet(config), config, options.head)
    else:
        model = find_teacher(options.model).load(options.head)
    rng = np.random.default_rng(1)
    prompt = rng.integers(0, model.vocab_size, max(options.context, options.prefill) + 1).tolist()
    cache = model.new_cache()
    model.prefill(prompt[: options.context], cache)

    draft = random_draft(model, options.draft) if options.draft else None
    draft_cache = draft.new_cache() if draft else None
    if draft is not None and draft_cache is not None:
        draft.prefill(prompt[: options.context], draft_cache)
    draft_seconds: list[float] = []
    rows = [int(m) for m in options.rows.split(",")]
    seconds: dict[int, list[float]] = {m: [] for m in rows}
    prefills: list[float] = []
    for round_ in range(options.rounds + 3):
        for m in rows:
            cache.offset = options.context
            started = time.perf_counter()
            greedy_tokens(model.step(prompt[:m], cache))
            if round_ >= 3:  # the first rounds compile and warm up
                seconds[m].append(time.perf_counter() - started)
        if draft is not None and draft_cache is not None:
            draft_cache.offset = options.context
            started = time.perf_counter()
            greedy_tokens(draft.step(prompt[:1], draft_cache))
            if round_ >= 3:
                draft_seconds.append(time.perf_counter() - started)
        if round_ % 10 == 3:
            fresh: KVCache = model.new_cache()
            started = time.perf_counter()
            model.prefill(prompt[: options.prefill], fresh)
            prefills.append(time.perf_counter() - started)

    step = {m: statistics.median(times) for m, times in seconds.items()}
    plain = step[rows[0]]
    bandwidth = max((read_bandwidth() for _ in range(3)), key=lambda found: found.gb_per_s)
    shape = Shape.of(model.config, options.model)
    read = teacher_bytes(shape, "int8" if options.head == "int8" else "bf16", options.context)
    report: dict[str, Any] = {
        "model": options.model,
        "backend": model.ops.NAME,
        "device": device_name(),
        "head": options.head,
        "context": options.context,
        "bytes_per_step": read,
        "seconds": step,
        "ratio_to_m1": {m: s / plain for m, s in step.items()},
        "plain_tok_per_s": 1 / plain,
        "plain_gb_per_s": read["total"] / plain / 1e9,
        "read_gb_per_s": bandwidth.gb_per_s,
        "fraction_of_bandwidth": read["total"] / plain / 1e9 / bandwidth.gb_per_s,
        "predicted_plain_tok_per_s": bandwidth.gb_per_s * 1e9 / read["total"],
        "prefill_tokens": options.prefill,
        "prefill_tok_per_s": options.prefill / statistics.median(prefills),
    }
    if draft is not None:
        cost = statistics.median(draft_seconds) / plain
        predicted = Costs(draft_bytes(Shape.of(draft.config, "the draft"), options.context)["total"] / read["total"])
        report["draft"] = {
            "size": options.draft,
            "seconds": statistics.median(draft_seconds),
            "cost": cost,
            "predicted_cost": predicted.draft,
            "speedups": {
                m - 1: {
                    "measured": tokens_per_verification(ACCEPTANCE, m - 1) / (step[m] / plain + (m - 1) * cost),
                    "predicted": predicted.speedup(ACCEPTANCE, m - 1),
                }
                for m in rows
                if m > 1
            },
        }
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    sys.exit(main())
