"""How fast a whole model takes steps of 1..8 rows, and prefills: verify(K + 1) against decode(1).

    python -m benchmarks.whole_model 2b --head int8 --layers 30
    python -m benchmarks.whole_model checkpoints/bitnet-smol-43m

`2b` is a model of BitNet-2B's shape with random ternary weights, made in memory. Every number of rows is
measured in turn, round after round, and medians are reported; a step ends when its choice of tokens is on
the host, as in decoding.
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
from mlx_lm.models import bitnet

from benchmarks.standin import BITNET_2B, random_codes
from decode.checkpoint import find_teacher
from decode.model import KVCache, Transformer
from decode.sampling import greedy_tokens
from kernels import BitLinear


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


def bytes_read(model: Transformer, context: int) -> dict[str, int]:
    """Bytes a step must read: ternary weights at two bits, the head as it is stored, keys and values."""
    weights = [w for layer in model.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    cache = 2 * len(model.layers) * model.shape.kv_heads * model.shape.head_dim * 4 * context
    return {"layers": sum(w.n * w.k // 4 for w in weights), "head": model.head.data.nbytes, "cache": cache}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="2b, or a checkpoint's folder")
    parser.add_argument("--layers", type=int, default=30, help="layers of the random model")
    parser.add_argument("--head", choices=("float", "int8"), default="float")
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
        if round_ % 10 == 3:
            fresh: KVCache = model.new_cache()
            started = time.perf_counter()
            model.prefill(prompt[: options.prefill], fresh)
            prefills.append(time.perf_counter() - started)

    step = {m: statistics.median(times) for m, times in seconds.items()}
    read = bytes_read(model, options.context)
    report: dict[str, Any] = {
        "model": options.model,
        "backend": model.ops.NAME,
        "head": options.head,
        "context": options.context,
        "bytes_per_step": read | {"total": sum(read.values())},
        "seconds": step,
        "ratio_to_m1": {m: s / step[rows[0]] for m, s in step.items()},
        "plain_tok_per_s": 1 / step[rows[0]],
        "plain_gb_per_s": sum(read.values()) / step[rows[0]] / 1e9,
        "prefill_tokens": options.prefill,
        "prefill_tok_per_s": options.prefill / statistics.median(prefills),
    }
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    sys.exit(main())
