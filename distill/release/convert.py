"""Any BitNet checkpoint that loads, written in Microsoft's packing.

The converted folder gives the same logits, bit for bit: the ternary weights and their scales are those that loading
the original gives, and every other tensor is copied as it is (what mlx-lm has quantised: as bfloat16, as it is read).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from decode.metal import limit_memory
from decode.models.checkpoint import Checkpoint
from decode.models.formats import Family, dequantized, packed_tensors
from decode.tokenizer import Tokenizer, copy_tokenizer_file
from distill.provenance import CONVERTED, copy_licence, origin
from distill.training.tensors import write_tensors
from kernels import UserError
from kernels.errors import first_line
from kernels.files import (
    cannot_write,
    check_own_files,
    finish_replacing,
    holds_current,
    named_by_users,
    read_json,
    replacing_files,
    sha256,
    unlisted_files,
    working_in,
)
from kernels.packing import check_codes

FORMAT = "bitdraft-packed-1"  # in converted.json, marks a folder as one that may be replaced
SHARD_BYTES = 1 << 30  # a file's size, which bounds the memory a conversion takes
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
WRITTEN = ("config.json", "model.safetensors.index.json", *COPIED)


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote."""

    family: str
    files: int
    tensors: int
    bytes: int


def check_converted_folder(folder: Path, source: Checkpoint) -> None:
    """Refuse a folder that cannot be written, that holds anything but an earlier conversion, or that is the original,
    and files of a conversion that would be replaced and are not as they were written."""
    with _own_folder(folder, source):
        pass


@contextmanager
def _own_folder(folder: Path, source: Checkpoint, room: float = 0) -> Iterator[None]:
    """Hold a folder's lock, after all of `check_converted_folder`. room: bytes that will be written at least."""
    if holds_current(folder):
        raise UserError(f"--out {folder.resolve()}: is the current folder or holds it; give it a folder of its own")
    if folder.exists() and folder.resolve() == source.folder.resolve():
        raise UserError(f"--out {folder}: is the checkpoint that is read")
    with working_in(folder, room):
        finish_replacing(folder, CONVERTED)
        names = sorted(named_by_users(folder))
        try:
            about = read_json(folder / CONVERTED)
        except UserError:
            about = {}
        if names and about.get("format") != FORMAT:
            raise UserError(f"--out {folder}: holds {names[0]} and is no conversion of bitdraft's: not overwritten")
        if names and "files" not in about:
            raise UserError(f"--out {folder}: an older version wrote it and did not list its files; delete it")
        check_own_files(folder, CONVERTED, WRITTEN)
        made_from = about["from"].get("hash") if isinstance(about.get("from"), dict) else None
        if names and made_from != source.weights_hash:
            raise UserError(f"--out {folder}: holds the conversion of another model; give another folder, or delete it")
        yield


def convert(
    checkpoint: Checkpoint, folder: Path, report: Callable[[int], object], shard_bytes: int = SHARD_BYTES
) -> Converted:
    """Write a BitNet checkpoint in Microsoft's packing: all files or none, in place of those of an earlier conversion.

    report: called with the bytes read since the last call; shard_bytes: where the weights are
    cut into files. UserError names what cannot be converted; then, as when interrupted, nothing is left behind.
    """
    limit_memory()
    size = sum(path.stat().st_size for path in checkpoint.folder.glob("model*.safetensors"))
    # A packed checkpoint keeps its size; of float master weights at least two bits in 32 remain.
    declared = checkpoint.config.get("quantization_config")
    packed = isinstance(declared, dict) and declared.get("quantization_mode") == "offline"
    with _own_folder(folder, checkpoint, size if packed else size / 16):
        _check_copied(checkpoint.folder)
        try:
            with replacing_files(folder, CONVERTED) as new:
                result = _write(checkpoint, new, report, shard_bytes)
                Checkpoint(new, checkpoint.name, read_json(new / "config.json")).check()
        except UserError as error:
            raise UserError(f"{checkpoint.folder}: {str(error).removeprefix(f'{new}: ')}") from None
        except OSError as error:
            raise UserError(f"{cannot_write(error)} {folder} (--out: {error.strerror or error})") from error
        except RuntimeError as error:  # MLX's, of files it cannot read
            raise UserError(f"{checkpoint.folder}: cannot be converted: {first_line(error)}") from error
    return result


def _check_copied(folder: Path) -> None:
    """Refuse files that would be copied as they are into a checkpoint that then does not load."""
    for name in COPIED:
        if name.endswith(".json") and (folder / name).is_file():
            read_json(folder / name)
    Tokenizer(folder)


def _write(checkpoint: Checkpoint, folder: Path, report: Callable[[int], object], shard_bytes: int) -> Converted:
    config = checkpoint.packed_config()
    family = Family.of(checkpoint.config)
    arrays = checkpoint.arrays()
    total = sum(array.nbytes for array in arrays.values())
    shard: dict[str, mx.array] = {}
    shards: list[list[str]] = []
    size = written = 0

    def flush() -> None:
        nonlocal size
        write_tensors(folder / f"part-{len(shards)}.safetensors", shard, {"format": "pt"})
        shards.append(list(shard))
        shard.clear()
        size = 0

    read = 0
    for name, array in _tensors(arrays, family, checkpoint.config, bool(config["tie_word_embeddings"])):
        if shard and size + array.nbytes > shard_bytes:
            flush()
        mx.eval(array)
        if array.dtype == mx.uint8:
            check_codes(np.array(array), name)
        shard[name] = array
        size += array.nbytes
        written += array.nbytes
        left = sum(array.nbytes for array in arrays.values())
        report(total - left - read)
        read = total - left
    flush()
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        (folder / f"part-{i}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        _write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": written}, "weight_map": dict(sorted(weight_map.items()))},
        )
    _write_json(folder / "config.json", config)
    for name in COPIED:
        if (checkpoint.folder / name).is_file():
            copy_tokenizer_file(checkpoint.folder / name, folder / name)
    source = {"name": checkpoint.name, "hash": checkpoint.weights_hash} | origin(checkpoint.folder)
    copy_licence(checkpoint.folder, folder, source, unlisted_files(folder.parent, CONVERTED))
    hashes = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    _write_json(folder / CONVERTED, {"format": FORMAT, "from": source, "was": family.name, "files": hashes})
    return Converted(family.name, len(shards), len(weight_map), written)


def _tensors(
    arrays: dict[str, mx.array], family: Family, config: dict[str, Any], tied: bool
) -> Iterator[tuple[str, mx.array]]:
    """The tensors of the converted checkpoint, one by one, taken out of `arrays`."""
    for name in [name for name in arrays if tied and name.startswith("lm_head.")]:
        del arrays[name]
    for module in [name.removesuffix(".scales") for name in arrays if name.endswith(".scales")]:
        yield f"{module}.weight", dequantized(arrays, module, config.get("quantization") or {})
    yield from packed_tensors(arrays, family)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
