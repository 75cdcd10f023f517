"""Our BitLinear in an mlx-lm model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import TEACHER

from kernels import BitLinear, UserError, reference, swap_bitlinear
from kernels.packing import pack_ternary


def layer(n: int = 12, k: int = 20, scale: float = 0.5, invert: bool = False) -> tuple[BitLinear, np.ndarray]:
    ternary = np.random.default_rng(0).integers(-1, 2, (n, k)).astype(np.int8)
    return BitLinear(mx.array(pack_ternary(ternary)), mx.array([scale]), invert_scale=invert, name="a.b"), ternary


@pytest.mark.parametrize("invert", [False, True])
def test_equals_the_definition(invert: bool) -> None:
    ours, ternary = layer(scale=0.3, invert=invert)
    x = mx.random.normal((2, 3, 20), key=mx.random.key(1))
    scale = np.full(12, 1 / np.float32(0.3) if invert else 0.3, np.float32)
    weight = reference.prepare_ternary(ternary, scale)
    expected = reference.linear(x.reshape(-1, 20), weight).reshape(2, 3, 12)
    assert mx.array_equal(ours(x), expected).item()
    assert mx.array_equal(ours(x), expected).item()  # the prepared weight is kept
    assert ours(x.astype(mx.bfloat16)).dtype == mx.bfloat16


def test_nothing_of_it_is_trained() -> None:
    ours, ternary = layer()
    assert ours.trainable_parameters() == {}
    np.testing.assert_array_equal(ours.ternary(), ternary)


def test_faults_name_the_layer() -> None:
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match=r"a\.b\.weight_scale"):
            layer(scale=scale)
    broken = BitLinear(mx.full((3, 4), 3, mx.uint8), mx.array([1.0]), invert_scale=False, name="a.b")
    with pytest.raises(UserError, match=r"a\.b\.weight: holds the code 3"):
        broken(mx.ones((1, 4)))


def loaded() -> nn.Module:
    from mlx_lm.utils import load_model

    model: Any = load_model(Path(TEACHER), lazy=True)[0]
    return model


def test_every_layer_of_a_teacher_is_swapped() -> None:
    from mlx_lm.models.bitlinear_layers import BitLinear as Stock

    model = loaded()
    stock = [name for name, module in model.named_modules() if isinstance(module, Stock)]
    assert len(stock) == 7 * len(model.layers)
    swap_bitlinear(model, {"linear_class": "autobitlinear"})
    ours = [name for name, module in model.named_modules() if isinstance(module, BitLinear)]
    assert ours == stock
    assert not any(isinstance(module, Stock) for _, module in model.named_modules())
    logits = model(mx.array([[1, 9690, 198]]))
    assert logits.shape == (1, 3, 16384) and np.isfinite(np.array(logits.astype(mx.float32))).all()


@pytest.mark.parametrize(("linear_class", "power"), [("autobitlinear", 1), ("bitlinear", -1), (None, -1)])
def test_linear_class_decides_between_times_and_divide(linear_class: str | None, power: int) -> None:
    model = loaded()
    scale = np.array(model.layers[0].mlp.up_proj.weight_scale.astype(mx.float32)).item()
    swap_bitlinear(model, {"linear_class": linear_class} if linear_class else {})
    assert model.layers[0].mlp.up_proj.scales()[0] == pytest.approx(scale**power, rel=1e-6)


def test_a_bias_is_refused() -> None:
    model = loaded()
    model.layers[2].mlp.up_proj.bias = mx.zeros((1536,))
    with pytest.raises(UserError, match=r"model\.layers\.2\.mlp\.up_proj: a BitLinear with a bias"):
        swap_bitlinear(model, {"linear_class": "autobitlinear"})
