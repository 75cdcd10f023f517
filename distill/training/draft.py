"""Draft models: small Llamas, in the layout of mlx-lm, that a stock `mlx_lm.load` can read unless
their head is trimmed (decode.models.draft_vocabulary).

The module is mlx-lm's own `llama`; training runs it through `forward` instead of its own call,
because rows hold several documents: attention must not cross them and RoPE restarts with each.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from decode.models.draft_vocabulary import check_kept
from decode.tokenizer import copy_tokenizer_file
from distill.training.draft_config import GROUP_SIZE, DraftConfig, load_tensors
from kernels.errors import UserError
from kernels.files import holds_current, link_or_copy, read_json, recover_folder, replacing_folder, sha256

FORMAT = "bitdraft-draft-1"
WEIGHTS = "model.safetensors"
KEPT = "kept"  # the tensor of ids in the weights of a draft with a trimmed head
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
OPTIONAL_FILES = ("generation_config.json", "chat_template.jinja", "special_tokens_map.json")


@dataclass(frozen=True)
class Draft:
    """A loaded draft: mlx-lm's module, its shape, the content of draft.json ({} if none), and the ids that
    a trimmed head keeps (int32, ascending; None for all)."""

    model: nn.Module
    config: DraftConfig
    provenance: dict[str, Any]
    kept: np.ndarray | None = None


def build(config: DraftConfig) -> nn.Module:
    """mlx-lm's Llama of that shape, its weights not yet evaluated."""
    from mlx_lm.models.llama import Model, ModelArgs  # slow to import

    return Model(ModelArgs.from_dict(config.to_json()))


def named_weights(model: nn.Module) -> dict[str, mx.array]:
    """A module's arrays by their names in a safetensors file."""
    flat: Any = tree_flatten(model.parameters())
    return dict(flat)


def create(config: DraftConfig, seed: int, embedding: mx.array | None = None) -> nn.Module:
    """A fresh draft in float32: matrices normal with 1/sqrt(inputs), those that write into the
    residual stream smaller by sqrt(2 layers) (GPT-2), norms one.

    embedding: float32 [vocab, hidden] to start the embedding from. The same seed gives the same
    weights and leaves MLX's global random state alone.
    """
    model = build(config)
    key = mx.random.key(seed)
    weights = []
    for name, array in sorted(named_weights(model).items()):
        if array.ndim == 1:
            weights.append((name, mx.ones(array.shape)))
            continue
        key, part = mx.random.split(key)
        scale = array.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            scale /= math.sqrt(2 * config.layers)
        weights.append((name, scale * mx.random.normal(array.shape, key=part)))
    model.update(tree_unflatten(weights))
    if embedding is not None:
        model.model.embed_tokens.weight = embedding
    mx.eval(model.parameters())
    return model


def init_embedding_from(teacher_embedding: np.ndarray, hidden: int, seed: int = 0) -> mx.array:
    """The teacher's embedding in fewer dimensions: tokens alike to it start out alike to the draft.

    Projects on the leading right singular vectors, turns the result by a random orthogonal matrix
    (or the first coordinates would hold nearly all variance, bad for RMSNorm, Adam and 4-bit
    groups) and scales it to the root mean square of a fresh embedding, 1/sqrt(hidden).
    teacher_embedding: float32 [v, h]. Returns float32 [v, hidden].
    """
    h = teacher_embedding.shape[1]
    gram = np.zeros((h, h))
    for block in np.array_split(teacher_embedding, max(1, len(teacher_embedding) // 8192)):
        gram += block.astype(np.float64).T @ block.astype(np.float64)
    vectors = np.linalg.eigh(gram)[1][:, ::-1][:, :hidden]
    vectors *= np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])])
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((hidden, hidden)))[0][: vectors.shape[1]]
    projected = teacher_embedding.astype(np.float32, copy=False) @ (vectors @ turn).astype(np.float32)
    return mx.array(projected * np.float32(hidden**-0.5 / np.sqrt(np.mean(projected**2) + 1e-20)))


def teacher_embedding(teacher_folder: Path) -> np.ndarray | None:
    """float32 [v, h] of a teacher's `model.embed_tokens.weight`, None where it has no such array."""
    for path in sorted(teacher_folder.glob("model*.safetensors")):
        arrays = load_tensors(path)
        if "model.embed_tokens.weight" in arrays:
            array = arrays["model.embed_tokens.weight"]
            # Not copied: a large vocabulary's takes gigabytes.
            return None if array.dtype == mx.uint32 else np.array(array.astype(mx.float32), copy=False)
    return None


def document_mask(document: mx.array) -> tuple[mx.array, mx.array]:
    """Who may attend to whom, and positions that restart with each document.

    document: integer [b, t], a document's positions standing together. Returns bool [b, 1, t, t]
    (query, key) and int32 [b, t].
    """
    t = document.shape[1]
    mask = (document[:, :, None] == document[:, None, :]) & (mx.arange(t)[:, None] >= mx.arange(t))
    return mask[:, None], mask.astype(mx.int32).sum(axis=-1) - 1


def masked_attention(q: mx.array, k: mx.array, v: mx.array, document: mx.array) -> mx.array:
    """Causal attention within documents, by MLX.

    q: [b, heads, t, d]; k, v: [b, kv_heads, t, d]; document: integer [b, t]. Returns the shape of q.
    """
    mask, _ = document_mask(document)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)


Attention = Callable[[mx.array, mx.array, mx.array, mx.array], mx.array]


def forward(
    model: nn.Module, tokens: mx.array, document: mx.array, attention: Attention = masked_attention
) -> mx.array:
    """Hidden states after the last norm, differentiable, in the dtype of the model's weights.

    tokens: int32 [b, t]; document: integer [b, t]; attention: how to compute it. Returns
    [b, t, hidden]; the head's product with them gives the logits (`head_weight`).
    """
    args = model.args
    b, t = tokens.shape
    _, positions = document_mask(document)
    # Gathered in the embedding's own dtype, so that its gradient adds up in it.
    x = model.model.embed_tokens(tokens).astype(model.model.norm.weight.dtype)
    d = args.head_dim
    frequency = args.rope_theta ** (-mx.arange(0, d, 2, dtype=mx.float32) / d)
    angle = positions.astype(mx.float32)[:, None, :, None] * frequency  # [b, 1, t, d / 2]
    cos, sin = mx.cos(angle).astype(x.dtype), mx.sin(angle).astype(x.dtype)

    def heads(y: mx.array) -> mx.array:
        return y.reshape(b, t, -1, d).transpose(0, 2, 1, 3)

    def rotate(y: mx.array) -> mx.array:  # kernels.reference.rope, heads before positions
        u, v = mx.split(y, 2, axis=-1)
        return mx.concatenate([u * cos - v * sin, v * cos + u * sin], axis=-1)

    for layer in model.model.layers:
        y = mx.fast.rms_norm(x, layer.input_layernorm.weight, args.rms_norm_eps)
        a = layer.self_attn
        q, k, v = rotate(heads(a.q_proj(y))), rotate(heads(a.k_proj(y))), heads(a.v_proj(y))
        y = attention(q, k, v, document)
        x = x + a.o_proj(y.transpose(0, 2, 1, 3).reshape(b, t, -1))
        y = mx.fast.rms_norm(x, layer.post_attention_layernorm.weight, args.rms_norm_eps)
        x = x + layer.mlp.down_proj(nn.silu(layer.mlp.gate_proj(y)) * layer.mlp.up_proj(y))
    return mx.fast.rms_norm(x, model.model.norm.weight, args.rms_norm_eps)


def head_weight(model: nn.Module, kept: mx.array | None = None) -> mx.array:
    """[v, hidden], the matrix that turns hidden states into logits; kept: the ids of a trimmed head."""
    weight = model.model.embed_tokens.weight if model.args.tie_word_embeddings else model.lm_head.weight
    return weight if kept is None else weight[kept]


def check_tokenizer(teacher_folder: Path) -> None:
    """UserError where a teacher lacks the files that its draft needs: better before hours of work than after."""
    for name in TOKENIZER_FILES:
        if not (teacher_folder / name).is_file():
            raise UserError(f"{teacher_folder / name}: not there, and a draft needs its teacher's tokenizer")


def check_out(folder: Path) -> None:
    """Refuse a folder that holds something else than a draft of ours, or cannot be written."""
    if holds_current(folder):
        raise UserError(f"{folder.resolve()}: is the current folder or holds it; a draft needs a folder of its own")
    recover_folder(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, not a folder for a draft")
    if folder.is_dir() and (names := {p.name for p in folder.iterdir()} - {"state", "log.jsonl", "curves.png"}):
        try:
            ours = read_json(folder / "draft.json").get("format") == FORMAT
        except UserError:
            ours = False
        if not ours:
            raise UserError(f"{folder}: holds {sorted(names)[0]} and is no draft of bitdraft's: not overwritten")
    above = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be written (no permission in {above})")


def save(
    folder: Path,
    model: nn.Module,
    config: DraftConfig,
    teacher_folder: Path,
    provenance: dict[str, Any],
    quantize_bits: int | None = None,
    carry: Iterable[str] = (),
    kept: np.ndarray | None = None,
) -> None:
    """Write a draft in one go: a temporary folder beside, then a rename.

    quantize_bits: None (bfloat16), 4 or 8; provenance: what draft.json says beside format and file
    hashes; carry: names in the folder replaced that move on into the new one; kept: the ids of a
    trimmed head, as many as `config.kept` says.
    """
    if quantize_bits is not None and quantize_bits not in GROUP_SIZE:
        raise UserError(f"--bits {quantize_bits}: 4, 8 or none")
    folder = folder.absolute()
    check_out(folder)
    check_tokenizer(teacher_folder)
    try:
        with replacing_folder(folder) as temporary:
            saved = build(config)
            saved.update(tree_map(lambda w: w.astype(mx.bfloat16), model.parameters()))
            description = config.to_json()
            if quantize_bits is not None:
                group = GROUP_SIZE[quantize_bits]
                nn.quantize(saved, group_size=group, bits=quantize_bits)
                description["quantization"] = {"group_size": group, "bits": quantize_bits}
            tensors = named_weights(saved) | ({} if kept is None else {KEPT: mx.array(kept, mx.int32)})
            mx.save_safetensors(str(temporary / WEIGHTS), tensors, {"format": "mlx"})
            (temporary / "config.json").write_text(json.dumps(description, indent=2) + "\n")
            for name in TOKENIZER_FILES + OPTIONAL_FILES:
                source = teacher_folder / name
                if source.is_file():
                    copy_tokenizer_file(source, temporary / name)
            hashes = {p.name: sha256(p) for p in sorted(temporary.iterdir())}
            about = {"format": FORMAT, **provenance, "config": asdict(config), "files": hashes}
            (temporary / "draft.json").write_text(json.dumps(about, indent=2, default=str) + "\n")
            for name in carry:
                link_or_copy(folder / name, temporary / name)
    except OSError as error:
        raise UserError(f"{folder}: cannot write the draft ({error.strerror or error})") from error


def rounded(weights: dict[str, mx.array], bits: int | None) -> dict[str, mx.array]:
    """Float32 weights as `save` would round them: what a saved draft computes with."""
    result = {}
    for name, weight in weights.items():
        narrow = weight.astype(mx.bfloat16)
        if bits is not None and weight.ndim > 1:
            group = GROUP_SIZE[bits]
            codes, scales, biases = mx.quantize(narrow, group_size=group, bits=bits)
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            narrow = mx.dequantize(codes, scales, biases, group_size=group, bits=bits)
        result[name] = narrow.astype(mx.float32)
    return result


def check_files(folder: Path, provenance: dict[str, Any]) -> None:
    """UserError where a file that draft.json lists is not there or not the same, or is not the draft's own."""
    files = provenance.get("files", {})
    if not isinstance(files, dict):
        raise UserError(f"{folder / 'draft.json'}: is damaged (`files` does not list names and hashes)")
    for name, digest in files.items():
        if Path(name).name != name:
            raise UserError(f"{folder / 'draft.json'}: names a file outside its folder: {name!r}")
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: not there; the draft is incomplete")
        if sha256(path) != digest:
            raise UserError(f"{path}: differs from what draft.json lists; cut short or changed")


def load(folder: Path) -> Draft:
    """Read a draft back, checking that all of it is there.

    The module is ready to call like any of mlx-lm's; a quantised one stays quantised.
    """
    folder = Path(folder).absolute()
    recover_folder(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such draft")
    description = read_json(folder / "config.json")
    try:
        config = DraftConfig.from_json(description)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: not a Llama's ({error})") from error
    provenance = read_json(folder / "draft.json") if (folder / "draft.json").is_file() else {}
    check_files(folder, provenance)
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: not there; the draft is incomplete")
    weights = load_tensors(path)
    model = build(config)
    if quantization := description.get("quantization"):
        nn.quantize(
            model,
            group_size=quantization["group_size"],
            bits=quantization["bits"],
            class_predicate=lambda p, m: hasattr(m, "to_quantized") and f"{p}.scales" in weights,
        )
    expected = {name: array.shape for name, array in named_weights(model).items()}
    if config.kept is not None:
        expected[KEPT] = (config.kept,)
    for name in sorted(expected.keys() | weights.keys()):
        found = weights[name].shape if name in weights else None
        if expected.get(name) != found:
            raise UserError(f"{path}: {name} is {found}, config.json asks for {expected.get(name)}")
    ids = weights.pop(KEPT, None)
    try:
        kept = None if ids is None else check_kept(ids, config.vocab_size)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    model.load_weights(list(weights.items()))
    mx.eval(model.parameters())
    return Draft(model, config, provenance, kept)
