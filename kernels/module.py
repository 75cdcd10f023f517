"""BitLinear as an `nn.Module`, to stand in an mlx-lm model where mlx-lm's own stood.

mlx-lm's BitLinear runs on Metal only and skips the int8 activations that BitNet was trained with.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from kernels.backends import backend
from kernels.errors import UserError
from kernels.packing import unpack_ternary


class BitLinear(nn.Module):
    """W1.58A8 linear layer over packed weights.

    packed: uint8 [n / 4, k]; weight_scale: one positive float, which outputs are multiplied by, or
    divided by with `invert_scale` (`linear_class` other than "autobitlinear").
    """

    def __init__(self, packed: mx.array, weight_scale: mx.array, *, invert_scale: bool, name: str) -> None:
        super().__init__()
        self.name = name
        self.weight = packed
        scale = np.array(weight_scale.astype(mx.float32)).item()
        if not (np.isfinite(scale) and scale > 0):
            raise UserError(f"{name}.weight_scale: {scale} is no positive number")
        self.scale = np.float32(1) / np.float32(scale) if invert_scale else np.float32(scale)
        self.freeze()

    def ternary(self) -> np.ndarray:
        """The weights, int8 [n, k] in {-1, 0, 1}. Raises UserError on the invalid code 3."""
        return unpack_ternary(np.array(self.weight), f"{self.name}.weight")

    def scales(self) -> np.ndarray:
        """What each output is multiplied by, float32 [n]."""
        return np.full(self.weight.shape[0] * 4, self.scale, np.float32)

    def __call__(self, x: mx.array) -> mx.array:
        """x: float [..., k]. Returns [..., n] in x's dtype."""
        if "_prepared" not in self.__dict__:
            self.__dict__["_prepared"] = backend().prepare_ternary(self.ternary(), self.scales())
        y = backend().linear(x.reshape(-1, x.shape[-1]).astype(mx.float32), self.__dict__["_prepared"])
        return y.reshape(*x.shape[:-1], -1).astype(x.dtype)


def swap_bitlinear(model: nn.Module, quantization_config: dict[str, Any]) -> nn.Module:
    """Replace every BitLinear of mlx-lm's in a loaded model by ours, in place.

    quantization_config: as in config.json. Its `linear_class` alone says whether scales divide: mlx-lm
    heeds it in a `llama`, but not in a `bitnet`.
    """
    # Imported here because it brings transformers along: a second that `--help` need not wait for.
    from mlx_lm.models import bitlinear_layers

    invert = quantization_config.get("linear_class") != "autobitlinear"
    ours: list[tuple[str, nn.Module]] = []
    leaves: list[tuple[str, nn.Module]] = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)  # type: ignore[assignment]
    for name, layer in leaves:
        if isinstance(layer, bitlinear_layers.BitLinear):
            if layer.bias is not None:
                raise UserError(f"{name}: a BitLinear with a bias is not supported")
            swapped = BitLinear(layer.weight, layer.weight_scale, invert_scale=invert, name=name)
            ours.append((name, swapped))
    model.update_modules(tree_unflatten(ours))
    return model
