"""Finding and loading models: the default teacher, folders, Hub names, with plain errors."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from safetensors import SafetensorError, safe_open

from decode.models import draft_vocabulary, formats
from decode.models.dimensions import checked_head_dim
from decode.models.hub import fetch_by_name
from decode.models.transformer import Precision, Transformer
from kernels import UserError, swap_bitlinear
from kernels.errors import first_line
from kernels.files import CONFIG, check_file, expanded, json_hash, own_name, read_json

ROOT = Path(__file__).resolve().parent.parent.parent
DEFAULT_TEACHER = ROOT / "checkpoints" / "bitnet-smol-116m"
RUNS = Path("runs")
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")  # of config.json, always there
OTHER_SIZES = (
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    draft_vocabulary.SIZE,
)
ROPE = ("rope_theta", "rope_scaling")
GGUF = "GGUF files (such as i2_s) are not read; take the safetensors checkpoint that they were made from"
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
CARD = "README.md"  # says which licence a model has


@dataclass(frozen=True)
class Checkpoint:
    """A model folder that has passed its checks; weights are not loaded yet."""

    folder: Path
    name: str
    config: dict[str, Any]

    def load(self, head: Precision = "float", layers: Precision = "float") -> Transformer:
        """Load through mlx-lm, with its BitLinear swapped for ours; head and layers as `Transformer` takes them."""
        with self._named_errors():
            model, config = self._load_model()
            return Transformer(model, config, head, layers)

    def check(self) -> None:
        """UserError where the weight files do not hold what config.json asks for, at the cost of their headers."""
        with self._named_errors():
            self._load_model()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.folder}: {error}") from None
        except (ValueError, KeyError, RuntimeError, TypeError, AttributeError, ArithmeticError, OSError) as error:
            raise UserError(f"{self.folder}: cannot be loaded: {first_line(error)}") from error

    def _load_model(self) -> tuple[nn.Module, dict[str, Any]]:
        """mlx-lm's module, its arrays read when used, and its config."""
        from mlx_lm.utils import load_model

        own: dict[str, Any] = {"model_config": {key: self.config[key] for key in ROPE if key in self.config}}
        if self.config.get("model_type") == draft_vocabulary.MODEL_TYPE:
            own["get_model_classes"] = draft_vocabulary.model_classes
        elif formats.is_bitnet(self.config):
            family = formats.Family.of(self.config)
            # What is left for mlx-lm to do is what it does to float layers, as `quantization` says.
            own["model_config"] = self.packed_config() | {"quantization_config": None}
            own["get_model_classes"] = lambda config: formats.model_classes(family)
        with _loadable(self.folder) as folder:
            model, config = load_model(folder, lazy=True, **own)
        return swap_bitlinear(model, formats.PACKED), config

    def packed_config(self) -> dict[str, Any]:
        """config.json as it is in Microsoft's packing, of a BitNet checkpoint."""
        tied = "tie_word_embeddings" in self.config or "lm_head.weight" not in self.arrays()
        return formats.packed_config(self.config, formats.Family.of(self.config), tied)

    def head_weight(self, embedding: mx.array) -> mx.array:
        """The output layer's matrix, bfloat16 or float32 [vocab, hidden]. embedding: the model's, which it may be."""
        arrays = self.arrays()
        if self.config.get("tie_word_embeddings", "lm_head.weight" not in arrays):
            return embedding
        weight = arrays["lm_head.weight"]
        if weight.dtype == mx.uint32:
            return formats.dequantized(arrays, "lm_head", self.config["quantization"])
        return weight if weight.dtype == mx.bfloat16 else weight.astype(mx.float32)

    def arrays(self) -> dict[str, mx.array]:
        """Every tensor of the weight files, read when used."""
        tensors: dict[str, mx.array] = {}
        for path in sorted(self.folder.glob("model*.safetensors")):
            tensors |= mx.load(str(path))  # type: ignore[arg-type]
        return tensors

    @cached_property
    def weights_hash(self) -> str:
        """sha256 over the weight files: names the exact model a dataset or draft was made for."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.glob("model*.safetensors")):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    @property
    def tokenizer_hash(self) -> str:
        """sha256 of what decides token ids: vocabulary, merges and special tokens, not file layout."""
        return tokenizer_hash(self.folder)


@contextmanager
def _loadable(folder: Path) -> Iterator[Path]:
    """A model's folder, or one of links to its weights where mlx-lm would read another's or none: it takes a path with
    `[`, `*` or `?` for a pattern, and reads config.json in the encoding of the terminal and as if no byte order mark
    could stand before it."""
    if _is_no_pattern(str(folder)) and (folder / CONFIG).read_bytes().isascii():
        yield folder
        return
    place = next(filter(_is_no_pattern, (tempfile.gettempdir(), "/tmp")))
    with tempfile.TemporaryDirectory(dir=place) as name:
        for file in folder.glob("model*.safetensors"):
            (Path(name) / file.name).symlink_to(file.resolve())
        (Path(name) / CONFIG).write_text(json.dumps(read_json(folder / CONFIG)), encoding="ascii")
        yield Path(name)


def _is_no_pattern(path: str) -> bool:
    """Whether the module `glob` takes a path as it is."""
    return glob.escape(path) == path


def tokenizer_hash(folder: Path) -> str:
    """sha256 of a tokenizer's tokens, merges and special tokens, however its `tokenizer.json` writes them.

    Tools that save a tokenizer again write merges as pairs or as words, and fill in what has no effect.
    """
    table = sorted((token_id, *entry) for token_id, entry in token_table(folder).items())
    model = read_json(folder / "tokenizer.json")["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or []]
    scores = model["vocab"] if isinstance(model["vocab"], list) else []
    return json_hash([table, merges, scores])


def has_tokenizer(folder: Path, recorded: str) -> bool:
    """Whether a dataset's `tokenizer_hash` is that of a folder. Until 0.2.0 it was of all that tokenizer.json holds."""
    return recorded in (tokenizer_hash(folder), json_hash(read_json(folder / "tokenizer.json")))


def embedded_teacher(option: str) -> Path:
    """The default teacher's folder; UserError, naming the option that was not given, outside a checkout."""
    if not DEFAULT_TEACHER.exists():
        raise UserError(f"no {option} given, and the embedded one is only in a checkout of bitdraft")
    return DEFAULT_TEACHER


def find_teacher(name: str | None) -> Checkpoint:
    """A BitNet checkpoint by path or Hub name; the embedded one by default."""
    checkpoint = find_model(str(embedded_teacher("--teacher")) if name is None else name, "--teacher")
    try:
        formats.Family.of(checkpoint.config)
    except UserError as error:
        raise UserError(f"{checkpoint.folder}/config.json: {error}") from None
    return checkpoint


def find_model(name: str, option: str) -> Checkpoint:
    """Resolve a path or a Hub name (`owner/name[@revision]`) to a checked model folder."""
    if not name.strip():  # which would be the current folder
        raise UserError(f"{option} {name!r}: is no name")
    folder = expanded(name)
    local = folder.exists()
    if not local:
        folder = _from_hub(name, option)
    if not folder.is_dir():
        raise UserError(f"{option} {name}: {GGUF if folder.suffix == '.gguf' else 'not a folder'}")
    for path in sorted(folder.glob("*")):
        if path.suffix in (".json", ".jinja", ".safetensors") and not path.name.startswith("."):
            check_file(path)
    if not (folder / "config.json").exists() and (any(folder.glob("*.gguf")) or name.lower().endswith("gguf")):
        raise UserError(f"{option} {name}: {GGUF}")
    config = _with_rope(read_json(folder / "config.json"))
    if config.get("model_file"):
        raise UserError(f"{folder}/config.json: asks for code of its own (model_file), which is never run")
    _check_config(config, folder / "config.json")
    _check_weights(folder)
    if not (folder / "tokenizer.json").exists():
        older = " (tokenizer.model alone is not read)" if (folder / "tokenizer.model").exists() else ""
        raise UserError(f"{folder}: tokenizer.json is missing{older}")
    return Checkpoint(folder, own_name(folder) if local else name, config)


def _check_config(config: dict[str, Any], path: Path) -> None:
    """Refuse sizes that are none: libraries would fail on them late and badly, MLX by ending the process."""
    for key in (*SIZES, *OTHER_SIZES):
        value = config.get(key)
        absent = value is None and key in OTHER_SIZES
        if not absent and (type(value) is not int or value < 1):  # bool is an int to isinstance
            raise UserError(f"{path}: {key} is {value!r}, not a positive number")
    if (heads := config.get("num_attention_heads")) is not None:
        try:
            checked_head_dim(
                config["hidden_size"], heads, config.get("num_key_value_heads") or heads, config.get("head_dim")
            )
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def _with_rope(config: dict[str, Any]) -> dict[str, Any]:
    """config.json with RoPE's settings where mlx-lm looks for them; transformers 5 writes `rope_parameters`."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" in config or "rope_theta" not in rope:
        return config
    scaled = rope.get("rope_type", "default") != "default"
    return config | {"rope_theta": rope["rope_theta"], "rope_scaling": rope if scaled else None}


def _from_hub(name: str, option: str) -> Path:
    def fetch(repo: str, revision: str | None) -> str:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import IncompleteSnapshotError

        try:
            return snapshot_download(repo, revision=revision, allow_patterns=[*PATTERNS, CARD])
        except IncompleteSnapshotError:  # without a connection, what was fetched without its card serves as well
            return snapshot_download(repo, revision=revision, allow_patterns=PATTERNS, local_files_only=True)

    return fetch_by_name(name, option, "folder", fetch)


def _check_weights(folder: Path) -> None:
    """Every weight file is there and whole (a header and as many bytes as it promises)."""
    files = set(folder.glob("model*.safetensors"))  # all of them are loaded, those that an index leaves out too
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: has no weight_map")
        for name in weight_map.values():
            if not isinstance(name, str):
                raise UserError(f"{index}: is damaged ({name!r} is no file's name)")
            if not name or Path(name).name != name:
                raise UserError(f"{index}: names a file outside its folder")
            files.add(folder / name)
    for file in sorted(files) or [folder / "model.safetensors"]:
        if not file.exists():
            pickles = sorted(folder.glob("pytorch_model*.bin"))
            why = f"only {pickles[0].name} is there, a pickle, which is never loaded" if pickles else "half-downloaded?"
            raise UserError(f"{file}: missing ({why})")
        try:
            with safe_open(file, "np"):
                pass
        except (SafetensorError, OSError) as error:
            if not os.access(file, os.R_OK):
                raise UserError(f"{file}: cannot be read (no permission)") from error
            raise UserError(f"{file}: damaged or cut short ({first_line(error)})") from error


def check_same_tokenizer(teacher: Checkpoint, draft: Checkpoint) -> None:
    """Refuse a draft whose token ids mean other things than the teacher's.

    Vocabulary, every token's text and the special tokens must agree; the files may differ
    in anything else.
    """
    ours, theirs = (token_table(checkpoint.folder) for checkpoint in (teacher, draft))
    where = f"draft {draft.folder} and teacher {teacher.folder}"
    if len(ours) != len(theirs) or teacher.config.get("vocab_size") != draft.config.get("vocab_size"):
        sizes = f"{draft.config.get('vocab_size')} and {teacher.config.get('vocab_size')}"
        raise UserError(f"{where} disagree in their vocabulary: sizes {sizes}, {len(theirs)} and {len(ours)} tokens")
    for token_id, entry in ours.items():
        if theirs.get(token_id) != entry:
            raise UserError(f"{where} disagree on token {token_id}: {theirs.get(token_id)} and {entry}")


def token_table(folder: Path) -> dict[int, tuple[str, bool]]:
    """Token id -> (text, is special), from tokenizer.json."""
    path = folder / "tokenizer.json"
    data = read_json(path)
    model = data.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not vocab or not isinstance(vocab, dict | list):
        raise UserError(f"{path}: has no vocabulary")
    try:  # as a list (Unigram), tokens with their scores, in the order of their ids
        ids = vocab.items() if isinstance(vocab, dict) else [(text, i) for i, (text, _) in enumerate(vocab)]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: its vocabulary is damaged ({error})") from error
    try:
        entries = data.get("added_tokens") or []
        added = [(entry["id"], entry["content"], bool(entry.get("special"))) for entry in entries]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: its added_tokens are damaged ({error!r})") from error
    tokens = [(token_id, text, False) for text, token_id in ids] + added
    for token_id, text, _ in tokens:
        if type(token_id) is not int:
            raise UserError(f"{path}: is damaged (the id of token {text!r} is {token_id!r})")
    return {token_id: (text, special) for token_id, text, special in tokens}
