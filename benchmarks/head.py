"""What rounding the output layer to 8 bits does to a teacher's predictions.

    python -m benchmarks.head checkpoints/bitnet-smol-116m --tokens 8192

Next-token predictions on real text by the head as the checkpoint has it ("bf16") and by `decode --head int8`
("int8"), over the same hidden states; and, to tell where the difference comes from, with the weights rounded
and the rows left as they are ("int8 weights only").
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from decode.models.checkpoint import ROOT, find_teacher
from decode.models.transformer import Transformer
from decode.tokenizer import Tokenizer
from distill.data.sources import read_source
from kernels.ops import Int8Weight
from kernels.reference import round_int8

WINDOW = 512
SOURCES = [ROOT / "data" / "novels.jsonl.xz", ROOT / "data" / "wiki.jsonl.xz"]


def windows(tokenizer: Tokenizer, sources: list[Path]) -> Iterator[np.ndarray]:
    """Pieces of the sources in turn, int32 [WINDOW + 1] each; a document begins behind an end token."""

    def one(source: Path) -> Iterator[np.ndarray]:
        ids: list[int] = []
        for document in read_source(source):
            ids += [min(tokenizer.end_tokens, default=0), *tokenizer.encode_text((document.text or "")[:20_000])]
            while len(ids) > WINDOW:
                yield np.array(ids[: WINDOW + 1], np.int32)
                ids = ids[WINDOW:]

    yield from (piece for piece in chain(*zip_longest(*map(one, sources))) if piece is not None)


def measure(model: Transformer, pieces: list[np.ndarray]) -> dict[str, dict[str, float]]:
    """Perplexity, agreement of first choices with the float head and KL(float || other) in nats, by head."""
    weight = model.head.data
    eight = model.ops.prepare_int8(weight)
    rounded, scale = round_int8(weight)
    plain = (rounded.astype(mx.float32) * scale[:, None]).T
    heads: dict[str, Any] = {
        "bf16": model.logits,
        "int8": lambda h: model.ops.linear(h, eight),
        "int8 weights only": lambda h: h @ plain,
    }
    sums = {name: np.zeros(3) for name in heads}
    for piece in pieces:
        last = len(model.layers) - 1
        hidden = model.normed(model.forward(piece[:-1], model.new_cache(), taps=[last]).hidden[last])
        target = mx.array(piece[1:, None])
        truth = mx.array(0.0)
        for name, head in heads.items():
            logits = head(hidden)
            logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            truth = logp if name == "bf16" else truth
            nll = -mx.take_along_axis(logp, target, axis=-1).sum()
            same = (mx.argmax(logp, axis=-1) == mx.argmax(truth, axis=-1)).sum()
            kl = (mx.exp(truth) * (truth - logp)).sum()
            sums[name] += [nll.item(), same.item(), kl.item()]
    count = WINDOW * len(pieces)
    return {
        name: {"perplexity": float(np.exp(nll / count)), "agreement": same / count, "kl": kl / count}
        for name, (nll, same, kl) in sums.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", nargs="?", help="a checkpoint's folder or Hub name; the embedded one without it")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--source", type=Path, action="append", help="text as `distill collect` takes it; may repeat")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    checkpoint = find_teacher(options.teacher)
    model = checkpoint.load()
    assert not isinstance(model.head, Int8Weight)
    stream = windows(Tokenizer(checkpoint.folder), options.source or SOURCES)
    pieces = [piece for piece, _ in zip(stream, range(max(1, options.tokens // WINDOW)), strict=False)]
    heads = measure(model, pieces)
    report = {"teacher": checkpoint.name, "tokens": WINDOW * len(pieces), "backend": model.ops.NAME, "heads": heads}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    print(f"{report['teacher']}, {report['tokens']} tokens, {report['backend']}")
    for name, r in heads.items():
        print(f"{name:>18}: perplexity {r['perplexity']:.4f}, same first choice {r['agreement']:.4f}, KL {r['kl']:.2e}")


if __name__ == "__main__":
    main()
