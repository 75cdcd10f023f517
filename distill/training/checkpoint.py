"""A draft as a folder: in the layout of mlx-lm, so that a stock `mlx_lm.load` can read it unless its head is trimmed
(decode.models.draft_vocabulary), written whole or not at all, and checked when it is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from decode.models.draft_vocabulary import D2T, check_d2t
from decode.models.drafts import ABOUT
from decode.tokenizer import TOKENIZER_FILES, check_tokenizer, copy_tokenizer_file
from distill.provenance import copy_licence
from distill.training.draft_config import GROUP_SIZE, DraftConfig
from distill.training.drafts import llama, reader
from distill.training.drafts.layers import matrices
from distill.training.state import STATE, is_begun
from distill.training.tensors import Tensors, load_tensors, write_tensors
from kernels.errors import UserError
from kernels.files import (
    cannot_write,
    check_own_files,
    finish_replacing,
    holds_current,
    json_hash,
    named_by_users,
    read_json,
    replacing_files,
    sha256,
    unlisted_files,
)
from kernels.packing import pack_ternary, quantize_ternary, unpack_ternary

FORMAT = "bitdraft-draft-1"
WEIGHTS = "model.safetensors"
OPTIONAL_FILES = ("generation_config.json", "chat_template.jinja", "special_tokens_map.json")
SAVED = ("config.json", WEIGHTS, *TOKENIZER_FILES, *OPTIONAL_FILES)  # listed in draft.json by their hashes


@dataclass(frozen=True)
class Draft:
    """A loaded draft: its weights as training has them, its shape, the content of draft.json ({} if none), and d2t, the
    ids of the teacher's that a trimmed head has rows for (int32, ascending; None for all)."""

    weights: Tensors
    config: DraftConfig
    provenance: dict[str, Any]
    d2t: np.ndarray | None = None


def check_draft_folder(folder: Path) -> None:
    """Refuse a folder that is no draft's or unfinished run's of ours, and files in ours that would be replaced and are
    not as we wrote them. What else lies in ours stays. For who holds the folder's lock, if anyone may."""
    if holds_current(folder):
        raise UserError(f"{folder.resolve()}: is the current folder or holds it; a draft needs a folder of its own")
    if not folder.is_dir():
        return
    finish_replacing(folder, ABOUT)
    names = _names(folder)
    if is_begun(folder / STATE):
        names &= {ABOUT}  # of a run of ours, whatever else is there
    elif STATE in names and not _names(folder / STATE):
        names -= {STATE}  # killed before it had begun
    if names and not _is_ours(folder):
        raise UserError(f"{folder}: holds {min(names)} and is no draft of bitdraft's: not overwritten")
    check_own_files(folder, ABOUT, SAVED)


def _names(folder: Path) -> set[str]:
    """What is in a folder, without the files that a process was killed over."""
    return named_by_users(folder) if folder.is_dir() else {""}


def _is_ours(folder: Path) -> bool:
    try:
        return read_json(folder / ABOUT).get("format") == FORMAT
    except UserError:
        return False


def save(
    folder: Path,
    weights: Tensors,
    config: DraftConfig,
    teacher_folder: Path,
    provenance: dict[str, Any],
    quantize_bits: int | None = None,
    d2t: np.ndarray | None = None,
) -> None:
    """Write a draft, all of its files or none, in place of the one that the folder has; other files there stay.

    quantize_bits: None (bfloat16), 4 or 8; provenance: what draft.json says beside format and file
    hashes; d2t: the ids that a trimmed head has rows for, as many as `config.draft_vocab_size` says.
    """
    if quantize_bits is not None and quantize_bits not in GROUP_SIZE:
        raise UserError(f"--bits {quantize_bits}: 4, 8 or none")
    check_draft_folder(folder)
    check_tokenizer(teacher_folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing_files(folder, ABOUT) as new:
            description, tensors = as_saved(weights, config, quantize_bits, d2t)
            write_tensors(new / WEIGHTS, tensors, {"format": "mlx"})
            (new / "config.json").write_text(json.dumps(description, indent=2) + "\n")
            for name in TOKENIZER_FILES + OPTIONAL_FILES:
                source = teacher_folder / name
                if source.is_file():
                    copy_tokenizer_file(source, new / name)
            copy_licence(teacher_folder, new, provenance.get("teacher", {}), unlisted_files(folder, ABOUT))
            hashes = {p.name: sha256(p) for p in sorted(new.iterdir())}
            about = {"format": FORMAT, **provenance, "config": config.record(), "files": hashes}
            (new / ABOUT).write_text(json.dumps(about, indent=2, default=str) + "\n")
    except OSError as error:
        raise UserError(f"{cannot_write(error)} {folder} (the draft: {error.strerror or error})") from error


def as_saved(
    weights: Tensors, config: DraftConfig, bits: int | None, d2t: np.ndarray | None
) -> tuple[dict[str, Any], Tensors]:
    """The content of a draft's config.json, and float32 weights as its file has them: bfloat16, matrices perhaps in
    mlx's quantisation, and ternary ones in BitNet's packing."""
    description = config.to_json()
    if bits is not None:
        description["quantization"] = {"group_size": GROUP_SIZE[bits], "bits": bits}
    tensors, ternary = Tensors(), ternary_names(config)
    for name, weight in sorted(weights.items()):  # those of a run that was resumed are in another order
        module, narrow = name.removesuffix(".weight"), weight.astype(mx.bfloat16)
        if name in ternary:
            codes, scale = quantize_ternary(np.array(weight), name)
            tensors |= {name: mx.array(pack_ternary(codes)), f"{module}.weight_scale": mx.array([float(scale)])}
        elif bits is not None and weight.ndim > 1:
            parts = mx.quantize(narrow, group_size=GROUP_SIZE[bits], bits=bits)
            tensors |= dict(zip((name, f"{module}.scales", f"{module}.biases"), parts, strict=True))
        else:
            tensors[name] = narrow
    return description, tensors | ({} if d2t is None else {D2T: mx.array(d2t, mx.int32)})


def ternary_names(config: DraftConfig) -> frozenset[str]:
    """The matrices that a ternary draft rounds: all but embedding and head."""
    shapes = reader.shapes(config) if config.taps else matrices(config)
    return frozenset(name for name, shape in shapes.items() if len(shape) > 1) if config.ternary else frozenset()


def rounded(weights: Tensors, config: DraftConfig, bits: int | None) -> Tensors:
    """Float32 weights as `save` would round them: what a saved draft computes with. Those that are computed with as
    ternary ones stay."""
    result, ternary = {}, ternary_names(config)
    for name, weight in weights.items():
        if name in ternary:
            result[name] = weight
            continue
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
    """Read a draft back, its weights in float32, checking that all of it is there."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such draft")
    description, config = read_json(folder / "config.json"), read_shape(folder / "config.json")
    provenance = read_json(folder / ABOUT) if (folder / ABOUT).is_file() else {}
    check_files(folder, provenance)
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: not there; the draft is incomplete")
    tensors = load_tensors(path)
    ids = tensors.pop(D2T, None)
    weights = _as_floats(tensors, description.get("quantization") or {}, path)
    expected = reader.shapes(config) if config.taps else llama.shapes(config)
    for name in sorted(expected.keys() | weights.keys()):
        found = weights[name].shape if name in weights else None
        if expected.get(name) != found:
            raise UserError(f"{path}: {name} is {found}, config.json asks for {expected.get(name)}")
    if (None if ids is None else ids.shape) != (config.draft_vocab_size and (config.draft_vocab_size,)):
        found = None if ids is None else ids.shape
        raise UserError(f"{path}: {D2T} is {found}, config.json asks for {config.draft_vocab_size} ids")
    try:
        d2t = None if ids is None else check_d2t(ids, config.vocab_size)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    mx.eval(weights)
    return Draft(weights, config, provenance, d2t)


def start_hash(folder: Path) -> str:
    """sha256 of what decides a training that goes on from a draft: its weights and its config.json."""
    return json_hash([sha256(folder / WEIGHTS), read_json(folder / "config.json")])


def read_shape(path: Path) -> DraftConfig:
    """The shape that a draft's config.json says. UserError where it is none, or another model's than training would
    run: with a bias, scaled RoPE, another activation."""
    description = read_json(path)
    try:
        config = DraftConfig.from_json(description)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a draft's ({error})") from error
    ours = config.to_json()
    for key in ("hidden_act", "attention_bias", "mlp_bias", "rope_scaling", "rope_parameters", "layer_types"):
        given = description.get(key)
        if given not in (None, False, ours.get(key)):
            raise UserError(f"{path}: {key} is {given!r}, which drafts in training do not have")
    return config


def _as_floats(tensors: Tensors, quantization: dict[str, Any], path: Path) -> Tensors:
    """The inverse of `as_saved`, but for what was rounded away. A ternary matrix gets the magnitude that rounds to it:
    the mean of all its weights is their scale."""
    weights: Tensors = {}
    for name, tensor in tensors.items():
        module, part = name.rsplit(".", 1)
        if part != "weight":
            continue
        try:
            if tensor.dtype == mx.uint8:
                ternary = unpack_ternary(np.array(tensor), f"{path}: {name}").astype(np.float32)
                scale = float(np.array(tensors[f"{module}.weight_scale"].astype(mx.float32))[0])
                tensor = mx.array(ternary * np.float32(scale / max(np.abs(ternary).mean(dtype=np.float64), 1e-12)))
            elif tensor.dtype == mx.uint32:
                tensor = mx.dequantize(
                    tensor,
                    tensors[f"{module}.scales"].astype(mx.float32),
                    tensors[f"{module}.biases"].astype(mx.float32),
                    group_size=quantization["group_size"],
                    bits=quantization["bits"],
                )
        except (KeyError, ValueError) as error:
            raise UserError(f"{path}: {name} cannot be read ({error})") from None
        weights[name] = tensor.astype(mx.float32)
    return weights
