"""How fast a whole model takes steps of 1..8 rows, and prefills: verify(K + 1) against decode(1).

    python -m benchmarks.whole_model 2b --head int8 --layers 30 --draft 6x768
    python -m benchmarks.whole_model checkpoints/bitnet-smol-116m

`2b` is a model of BitNet-2B's shape with random ternary weights, made in memory. Every number of rows is
measured in turn, round after round, and medians are reported; a step ends when its choice of tokens is on
the host, as in decoding; `generate_tok_per_s` is plain decoding with the next step queued before a token is known, and
without. The bandwidth is measured between the rounds, and what `decode plan` predicts from it
stands beside what was measured. With --draft, a step of a random draft of that size is measured too, and whole rounds
of drafting and verifying; speed-ups for an acceptance of 0.7 are those of the measured costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.models import bitnet, llama
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from benchmarks.standin import BITNET_2B, random_codes
from decode.drafters.model import ModelDrafter
from decode.engine import Request, generate
from decode.models.cache import KVCache
from decode.models.checkpoint import find_teacher
from decode.models.dimensions import Dimensions
from decode.models.transformer import Transformer
from decode.plan import Costs, draft_bytes, teacher_bytes, tokens_per_verification
from decode.timing import timed
from kernels import BitLinear, swap_bitlinear
from kernels.backends import device_backend
from kernels.bandwidth import Bandwidth, CpuReader, GpuReader
from kernels.device import device_name, processors

STREAMED = 1 << 29  # bytes: far more than caches hold
ACCEPTANCE = 0.7  # for the speed-ups
WARM_UP = 3  # rounds that compile and fill caches
GENERATED = 64  # tokens, plainly or in rounds


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
    shape = Dimensions.of_draft(
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


def memory_reader() -> Callable[[], Bandwidth]:
    """What reads memory as fast as can be here, with all processors or on the GPU."""
    if device_backend() == "cpu":
        return partial(CpuReader(STREAMED).measure, processors())
    return GpuReader(STREAMED).measure


def stock_step(folder: str, context: list[int]) -> Callable[[], None]:
    """A step of the same teacher as stock MLX computes it on a CPU: float32 matrices, mlx-lm's model and cache."""
    checkpoint = find_teacher(folder)
    model, config = load_model(checkpoint.folder, lazy=True)
    swap_bitlinear(model, config.get("quantization_config") or {})
    floats = []
    for name, layer in model.named_modules():
        if isinstance(layer, BitLinear):
            weight = mx.array(layer.ternary() * layer.scales()[:, None])
            dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            dense.weight = weight
            floats.append((name, dense))
    model.update_modules(tree_unflatten(floats))
    model.set_dtype(mx.float32)
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([context]), cache=cache))

    def step() -> None:
        np.array(mx.argmax(model(mx.array([context[:1]]), cache=cache)[0], axis=-1))
        for layer_cache in cache:
            layer_cache.trim(1)

    return step


def step_of(model: Transformer, cache: KVCache, tokens: list[int], offset: int) -> Callable[[], None]:
    """A step of these tokens at an offset, until its choices are on the host."""

    def step() -> None:
        cache.offset = offset
        np.array(model.best_tokens(model.step(tokens, cache).logits))

    return step


def generated(model: Transformer, prompt: list[int], queued: bool) -> float:
    """Tokens a second of plain decoding by the engine, with steps queued ahead or not."""
    usual, model.async_decode = model.async_decode, queued
    rounds = list(timed(generate(model, Request(prompt, GENERATED + 1))))
    model.async_decode = usual
    return GENERATED / sum(came - asked for _, asked, came in rounds[1:])


def round_seconds(model: Transformer, draft: Transformer, prompt: list[int], k: int) -> float:
    """Median time of a round of the engine that drafts and verifies k tokens, of which random weights accept next to
    none."""
    rounds = timed(generate(model, Request(prompt, GENERATED), ModelDrafter(draft), k))
    times = [came - asked for found, asked, came in rounds if found.drafted == k]
    return statistics.median(times[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="2b, or a checkpoint's folder")
    parser.add_argument("--layers", type=int, default=30, help="layers of the random model")
    parser.add_argument("--head", choices=("float", "int8"), default="float")
    parser.add_argument("--draft", metavar="LAYERSxHIDDEN", help="also measure a draft of this size")
    parser.add_argument("--stock", action="store_true", help="also measure stock MLX's float32 path, of a folder")
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
    rows = [int(m) for m in options.rows.split(",")]
    draft = random_draft(model, options.draft) if options.draft else None

    def filled(of: Transformer) -> KVCache:
        cache = of.new_cache()
        of.prefill(prompt[: options.context], cache)
        return cache

    cache = filled(model)
    steps = {str(m): step_of(model, cache, prompt[:m], options.context) for m in rows}
    if draft is not None:
        steps["draft"] = step_of(draft, filled(draft), prompt[:1], options.context)
    if options.stock:
        steps["stock"] = stock_step(options.model, prompt[: options.context])
    steps["prefill"] = lambda: model.prefill(prompt[: options.prefill], model.new_cache())
    read_memory, bandwidths = memory_reader(), []
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(options.rounds + WARM_UP):
        for name, step in steps.items():
            if name == "prefill" and round_ % 4:
                continue
            started = time.perf_counter()
            step()
            if round_ >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
        if round_ % 4 == 0:
            bandwidths.append(read_memory().gb_per_s)
            steps[str(rows[0])]()  # what reading has driven out of the caches comes back

    rates: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(3):
        for queued, found in rates.items():
            found.append(generated(model, prompt[: options.context], queued))
    whole_rounds = {}
    if draft is not None:
        whole_rounds = {m - 1: round_seconds(model, draft, prompt[: options.context], m - 1) for m in rows if m > 1}
    report = summary(model, draft, {name: statistics.median(times) for name, times in seconds.items()}, options)
    bandwidth = statistics.median(bandwidths)
    report |= {
        "read_gb_per_s": bandwidth,
        "fraction_of_bandwidth": report["plain_gb_per_s"] / bandwidth,
        "predicted_plain_tok_per_s": bandwidth * 1e9 / report["bytes_per_step"]["total"],
        "generate_tok_per_s": {"queued": statistics.median(rates[True]), "waiting": statistics.median(rates[False])},
    }
    if draft is not None:
        best = max(report["generate_tok_per_s"].values())
        report["draft"]["rounds"] = {
            k: {"seconds": each, "speedup": tokens_per_verification(ACCEPTANCE, k) / each / best}
            for k, each in whole_rounds.items()
        }
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


def summary(
    model: Transformer, draft: Transformer | None, seconds: dict[str, float], options: argparse.Namespace
) -> dict[str, Any]:
    """What medians of seconds say; with a draft, beside what bytes alone predict."""
    rows = [int(m) for m in options.rows.split(",")]
    plain = seconds[str(rows[0])]
    read = teacher_bytes(
        Dimensions.of(model.config, options.model), "int8" if options.head == "int8" else "bf16", options.context
    )
    report: dict[str, Any] = {
        "model": options.model,
        "backend": model.ops.NAME,
        "device": device_name(),
        "head": options.head,
        "context": options.context,
        "bytes_per_step": read,
        "seconds": seconds,
        "ratio_to_m1": {m: seconds[str(m)] / plain for m in rows},
        "plain_tok_per_s": 1 / plain,
        "plain_gb_per_s": read["total"] / plain / 1e9,
        "prefill_tokens": options.prefill,
        "prefill_tok_per_s": options.prefill / seconds["prefill"],
    }
    if options.stock:
        report["times_stock"] = seconds["stock"] / plain
    if draft is not None:
        cost = seconds["draft"] / plain
        predicted = Costs(
            draft_bytes(Dimensions.of(draft.config, "the draft"), options.context)["total"] / read["total"]
        )
        report["draft"] = {
            "size": options.draft,
            "cost": cost,
            "predicted_cost": predicted.draft,
            "speedups": {
                m - 1: {
                    "measured": tokens_per_verification(ACCEPTANCE, m - 1) / (seconds[str(m)] / plain + (m - 1) * cost),
                    "predicted": predicted.speedup(ACCEPTANCE, m - 1),
                }
                for m in rows
                if m > 1
            },
        }
    return report


if __name__ == "__main__":
    sys.exit(main())
