"""Small teachers and datasets made up for tests: a teacher that can be learned exactly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from decode.models.checkpoint import Checkpoint, tokenizer_hash
from distill.data.codec import Block, SampledBlock
from distill.data.draws import draw_on_host, tally
from distill.data.manifest import DatasetSettings
from distill.data.shards import ShardWriter

VOCAB = 96
SEQ_LEN = 32
K = 8


def teacher_folder(folder: Path, vocab: int = VOCAB) -> Path:
    """A folder with a teacher's config and a word-level tokenizer, but no weights."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "bitnet",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 256,
        "vocab_size": vocab,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w2", "unk_token": "w0"})
    )
    return folder


def block(rows: int, seed: int, mask: bool = True, vocab: int = VOCAB, k: int = K) -> Block:
    """Rows of a Markov chain whose transition logits the teacher reports: learnable to the last nat."""
    table = 2.0 * np.random.default_rng(0).standard_normal((vocab, vocab))
    rng = np.random.default_rng(seed)
    tokens = np.zeros((rows, SEQ_LEN), np.int32)
    tokens[:, 0] = rng.integers(vocab, size=rows)
    p = np.exp(table) / np.exp(table).sum(axis=1, keepdims=True)
    for t in range(1, SEQ_LEN):
        draws = rng.random(rows)[:, None]
        tokens[:, t] = (p[tokens[:, t - 1]].cumsum(axis=1) < draws).sum(axis=1).clip(max=vocab - 1)
    segments = np.ones((rows, SEQ_LEN), np.uint8)
    segments[:, SEQ_LEN // 2 :] = 2
    segments[:, -2:] = 0
    logits = table[tokens]
    ids = np.argsort(-logits, axis=-1, kind="stable")[..., :k].astype(np.int32)
    lse = np.stack([np.log(np.exp(logits / t).sum(axis=-1)) for t in (1.0, 0.7)], axis=-1)
    top = np.take_along_axis(logits, ids, axis=-1) - lse[..., :1]
    trained = (segments > 0) & (np.arange(SEQ_LEN) >= 4) & mask
    return Block(tokens, trained, segments, ids, top.astype(np.float32), lse.astype(np.float32))


def sampled_block(rows: int, seed: int, draws: int) -> SampledBlock:
    """The same rows, with draws from the teacher's distribution."""
    whole = block(rows, seed, k=VOCAB)
    logits = np.empty((rows * SEQ_LEN, VOCAB), np.float32)
    np.put_along_axis(logits, whole.top_ids.reshape(-1, VOCAB), whole.top_logprobs.reshape(-1, VOCAB), axis=1)
    drawn = draw_on_host(logits, np.random.default_rng(seed).random((len(logits), draws), np.float32))
    ids, counts = tally(logits.argmax(axis=1).astype(np.int32), drawn, whole.loss_mask.ravel())
    wide = (rows, SEQ_LEN, draws + 1)
    return SampledBlock(whole.tokens, whole.loss_mask, whole.segments, ids.reshape(wide), counts.reshape(wide))


def dataset(
    folder: Path, teacher: Path, shards: int = 3, rows: int = 16, mask: bool = True, sampled: int | None = None
) -> Path:
    """A finished dataset for the teacher, of logits or of so many draws a position."""
    settings = DatasetSettings(
        {
            "teacher": {"name": "synthetic", "hash": Checkpoint(teacher, teacher.name, {}).weights_hash},
            "tokenizer_hash": tokenizer_hash(teacher),
            "vocab_size": VOCAB,
            **(
                {"k": K, "temperatures": [1.0, 0.7]} if sampled is None else {"sampled": sampled, "temperatures": [1.0]}
            ),
            "seq_len": SEQ_LEN,
        }
    )
    with ShardWriter.open(folder, settings) as writer:
        for i in range(shards):
            seed = i + 1
            writer.write(block(rows, seed, mask) if sampled is None else sampled_block(rows, seed, sampled))
        writer.finish()
    return folder
