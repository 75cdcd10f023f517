"""BitNet checkpoints of several makes, brought into the one form that the kernels read: Microsoft's packing.

That form has, for each projection of a layer, `weight` uint8 [n / 4, k] and `weight_scale` [1], which outputs are
multiplied by (kernels.packing). Others divide by the scale (`linear_class: bitlinear`, the Falcon models), keep float
master weights that are made ternary on load (`quantization_mode: online`, or the models of 1bitLLM, which name their
sub-norms differently), or went through `mlx_lm.convert`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from decode.models.transformer import ACTIVATIONS
from kernels import UserError
from kernels.packing import pack_ternary, quantize_ternary

PACKED = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
# Of decode.models.reader in config.json: its model type, the teacher's layers that it reads, and their width.
READER, TAPS, TEACHER_HIDDEN = "bitdraft_reader", "taps", "teacher_hidden_size"
# Names of 1bitLLM's, and the same norm's in Microsoft's checkpoint.
_RENAMED = {"self_attn.inner_attn_ln.": "self_attn.attn_sub_norm.", "mlp.ffn_layernorm.": "mlp.ffn_sub_norm."}
# Keys of config.json that speak of another form, or of code that is never run.
_DROPPED = ("quantization", "quantization_config", "auto_map", "weight_bits", "input_bits", "_name_or_path")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """What a checkpoint's config.json says of its form.

    model_type: whose layers these are, "bitnet" (with sub-norms) or "llama" (without); online: the weights are floats,
    to be made ternary; divide: by `weight_scale`.
    """

    name: str
    model_type: str
    online: bool
    divide: bool

    @classmethod
    def of(cls, config: dict[str, Any]) -> Family:
        """The family of a config.json; UserError, without the file's name, where there is none for it."""
        model_type, quantization = config.get("model_type"), config.get("quantization_config")
        if model_type == READER:
            raise UserError("is of a draft that reads its teacher's states, and no model of its own")
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if quantization is None and _is_1bitllm(config):
            family = cls("1bitLLM", "bitnet", online=True, divide=False)
        elif method == "bitnet":
            assert isinstance(quantization, dict)
            family = _declared(str(model_type), quantization)
        elif method is None and isinstance(config.get("quantization"), dict) and model_type == "bitnet":
            # `mlx_lm.convert -q` overwrites quantization_config; its `bitnet` always multiplies.
            family = cls("bitnet, quantised by mlx-lm", "bitnet", online=False, divide=False)
        elif method is None and isinstance(config.get("quantization"), dict):
            raise UserError(
                f"not a BitNet checkpoint: a {model_type!r} quantised by mlx-lm, which keeps nothing of how a BitNet's"
                " scales are meant; take the checkpoint it was made from"
            )
        else:
            raise UserError(f"not a BitNet checkpoint (quant_method is {method!r}, not 'bitnet')")
        if not isinstance(model_type, str) or model_type not in ACTIVATIONS:
            raise UserError(f"model_type {model_type!r} is not supported (bitnet and llama are)")
        for key in ("attention_bias", "mlp_bias"):
            if config.get(key):
                raise UserError(f"{key}: layers with a bias are not supported")
        return family


def is_bitnet(config: dict[str, Any]) -> bool:
    """Whether a config.json is a BitNet's, supported or not."""
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return method == "bitnet" or config.get("model_type") == "bitnet" or (method is None and _is_1bitllm(config))


def _is_1bitllm(config: dict[str, Any]) -> bool:
    """Whether the config is of the models of `1bitLLM`, a `llama` by its model_type, with code of its own."""
    architectures = config.get("architectures")
    named = isinstance(architectures, list) and "BitnetForCausalLM" in architectures
    if not named and "weight_bits" not in config:
        return False
    bits = config.get("weight_bits", 1), config.get("input_bits", 8)
    if bits != (1, 8):
        raise UserError(f"weight_bits and input_bits are {bits[0]} and {bits[1]}; BitNet b1.58 has 1 and 8")
    return True


def _declared(model_type: str, quantization: dict[str, Any]) -> Family:
    """The family of a `quantization_config` of Hugging Face's; its defaults are those of transformers."""
    linear = quantization.get("linear_class", "bitlinear")
    mode = quantization.get("quantization_mode", "offline")
    if linear not in ("bitlinear", "autobitlinear"):
        raise UserError(f"linear_class {linear!r} is not supported (bitlinear and autobitlinear are)")
    if mode not in ("offline", "online"):
        raise UserError(f"quantization_mode {mode!r} is not supported (offline and online are)")
    if quantization.get("use_rms_norm"):
        raise UserError("use_rms_norm: linear layers with a norm of their own are not supported")
    skipped = quantization.get("modules_to_not_convert") or []
    if not isinstance(skipped, list):
        raise UserError(f"modules_to_not_convert is {skipped!r}, not a list of names")
    for name in skipped:
        if any(projection in str(name) for projection in _PROJECTIONS):
            raise UserError(f"modules_to_not_convert names {name!r}: layers that are partly float are not supported")
    # transformers has no online `bitlinear`: that class reads packed weights whatever the mode is.
    online = mode == "online" and linear == "autobitlinear"
    return Family(
        f"{model_type}, {linear}, {'online' if online else 'offline'}", model_type, online, linear == "bitlinear"
    )


def packed_config(config: dict[str, Any], family: Family, tied: bool) -> dict[str, Any]:
    """The config.json of the same model in Microsoft's packing. tied: where the original does not say."""
    kept = {key: value for key, value in config.items() if key not in _DROPPED}
    defaults = {"hidden_act": ACTIVATIONS[family.model_type], "tie_word_embeddings": tied}
    architecture = "BitNetForCausalLM" if family.model_type == "bitnet" else "LlamaForCausalLM"
    return {
        **defaults,
        **kept,
        "architectures": [architecture],
        "model_type": family.model_type,
        "quantization_config": PACKED,
    }


def packed_tensors(arrays: dict[str, mx.array], family: Family) -> Iterator[tuple[str, mx.array]]:
    """A checkpoint's tensors in Microsoft's packing, one by one, taken out of `arrays` as they come.

    Arrays that mlx-lm has quantised (an embedding) stay so. UserError names a tensor that is no ternary weight.
    """
    for name in sorted(arrays):
        if name not in arrays or name.endswith(".weight_scale") or "rotary_emb.inv_freq" in name:
            continue
        array = arrays.pop(name)
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in _PROJECTIONS and module != name:
            packed, scale = _packed(module, array, arrays.pop(f"{module}.weight_scale", None), family)
            yield name, packed
            yield f"{module}.weight_scale", scale
        elif f"{module}.weight_scale" in arrays:
            raise UserError(f"{module}: a ternary layer other than those of attention and feed-forward")
        else:
            for old, new in _RENAMED.items():
                name = name.replace(old, new)
            yield name, array


def _packed(module: str, weight: mx.array, scale: mx.array | None, family: Family) -> tuple[mx.array, mx.array]:
    """One projection: uint8 [n / 4, k], and the scale to multiply by, [1]."""
    if weight.ndim != 2:
        raise UserError(f"{module}.weight: has the shape {list(weight.shape)}, not [n, k]")
    if weight.dtype == mx.uint32:
        raise UserError(f"{module}.weight: quantised by mlx-lm, not ternary")
    is_float = mx.issubdtype(weight.dtype, mx.floating)
    if is_float and weight.shape[0] % 4:
        raise UserError(f"{module}.weight: {weight.shape[0]} outputs are not a multiple of 4, as the packing asks for")
    if is_float and family.online:
        ternary, value = quantize_ternary(np.array(weight.astype(mx.float32)), f"{module}.weight")
        # As published: the scale has the type of the weights.
        return mx.array(pack_ternary(ternary)), mx.array([float(value)]).astype(weight.dtype)
    if scale is None:
        raise UserError(f"{module}.weight_scale: missing")
    if scale.size != 1:
        raise UserError(f"{module}.weight_scale: {scale.size} scales; BitNet b1.58 has one a matrix")
    if is_float:
        values = np.array(weight.astype(mx.float32))
        if not np.isin(values, (-1, 0, 1)).all():
            raise UserError(f"{module}.weight: holds other values than -1, 0 and 1")
        weight = mx.array(pack_ternary(values.astype(np.int8)))
    elif weight.dtype != mx.uint8:
        raise UserError(f"{module}.weight: {weight.dtype} is not how ternary weights are kept")
    if family.divide:  # in float32: 1 / scale seldom fits a narrower type
        scale = mx.array(np.float32(1) / np.array(scale.astype(mx.float32)))
    return weight, scale.reshape(1)


def model_classes(family: Family) -> tuple[type, type]:
    """Model and arguments for a checkpoint of a family, as `mlx_lm.utils.load_model` asks for them."""
    from mlx_lm.models import bitlinear_layers, bitnet, llama

    module: Any = bitnet if family.model_type == "bitnet" else llama

    class Model(module.Model):  # type: ignore[misc]
        def __init__(self, args: Any) -> None:
            super().__init__(args)
            if family.model_type == "llama":
                bitlinear_layers.bitnet_quantize(self, {"modules_to_not_convert": ["lm_head"]})

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            result: dict[str, mx.array] = super().sanitize(dict(packed_tensors(weights, family)))
            if self.args.tie_word_embeddings:  # a quantised copy has more tensors than `weight`
                result = {name: array for name, array in result.items() if not name.startswith("lm_head.")}
            return result

    return Model, module.ModelArgs


def dequantized(arrays: dict[str, mx.array], module: str, quantization: dict[str, Any]) -> mx.array:
    """An embedding or head that mlx-lm has quantised, taken out of `arrays`; bfloat16, as a `Transformer` reads it.

    quantization: of config.json.
    """
    settings = quantization.get(module) if isinstance(quantization.get(module), dict) else quantization
    assert isinstance(settings, dict)
    weight = mx.dequantize(
        arrays.pop(f"{module}.weight"),
        arrays.pop(f"{module}.scales"),
        arrays.pop(f"{module}.biases", None),
        group_size=settings.get("group_size"),
        bits=settings.get("bits"),
        mode=settings.get("mode", "affine"),
    )
    return weight.astype(mx.bfloat16)
