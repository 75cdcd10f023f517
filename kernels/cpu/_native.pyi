from collections.abc import Sequence

import mlx.core as mx
import numpy as np

mlx_version: str
sources: str  # SHA-256 over those of the files in native/, sorted
max_threads: int

def pack_ternary(ternary: np.ndarray) -> mx.array: ...
def pack_int8(weight: np.ndarray) -> mx.array: ...
def quantize_rows(x: mx.array, norm: mx.array | None, eps: float) -> list[mx.array]: ...
def bitlinear(xq: mx.array, s: mx.array, tiles: mx.array, scale: mx.array, k: int) -> mx.array: ...
def int8_product(xq: mx.array, s: mx.array, tiles: mx.array, scale: mx.array, k: int) -> mx.array: ...
def ternary_linear(
    x: mx.array,
    tiles: mx.array,
    scale: mx.array,
    k: int,
    norm: mx.array | None,
    eps: float,
    epilogue: int,
    residual: mx.array | None,
) -> mx.array: ...
def int8_linear(
    x: mx.array,
    tiles: mx.array,
    scale: mx.array,
    k: int,
    norm: mx.array | None,
    eps: float,
    epilogue: int,
    residual: mx.array | None,
) -> mx.array: ...
def dense_linear(
    x: mx.array,
    weight: mx.array,
    norm: mx.array | None,
    eps: float,
    epilogue: int,
    residual: mx.array | None,
) -> mx.array: ...
def attention(
    qkv: mx.array,
    k_cache: mx.array,
    v_cache: mx.array,
    offsets: Sequence[int],
    counts: Sequence[int],
    heads: int,
    kv_heads: int,
    inverse_frequency: mx.array,
    scale: float,
) -> list[mx.array]: ...
def argmax(x: mx.array) -> mx.array: ...
def choose(logits: mx.array, temperature: mx.array, uniform: mx.array) -> mx.array: ...
def top_k(logits: mx.array, k: int, temperatures: Sequence[float]) -> list[mx.array]: ...
def clock(x: mx.array) -> mx.array: ...

class Linear: ...
class FusedModel: ...

def make_linear(data: mx.array, scale: mx.array | None, n: int, k: int, norm: mx.array | None) -> Linear: ...
def fused_model(
    embedding: mx.array,
    inverse_frequency: mx.array,
    heads: int,
    kv_heads: int,
    scale: float,
    epilogue: int,
    eps: float,
    before: Sequence[Linear],
    layers: Sequence[Linear],
    after: Sequence[Linear],
) -> FusedModel: ...
def fused_step(
    model: FusedModel, tokens: mx.array, caches: list[mx.array], offset: int, taps: Sequence[int]
) -> list[mx.array]: ...
def choose_tokens(
    model: FusedModel,
    tokens: mx.array,
    caches: list[mx.array],
    sequences: Sequence[int],
    offsets: Sequence[int],
    temperature: Sequence[float],
    uniform: Sequence[float],
) -> list[mx.array]: ...
def greedy_tokens(
    model: FusedModel,
    tokens: mx.array,
    states: Sequence[mx.array],
    caches: list[mx.array],
    offset: int,
    count: int,
    d2t: mx.array | None,
) -> list[mx.array]: ...
def isa() -> str: ...
def available_isas() -> list[str]: ...
def select_isa(name: str) -> None: ...
def threads() -> int: ...
def set_threads(count: int) -> None: ...
def take_short_slices() -> None: ...
def keep_freed_memory() -> None: ...
def parallel_sum(chunks: int) -> int: ...
def install_blas(path: str) -> int: ...
def blas_installed() -> bool: ...
def matmul(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None: ...
