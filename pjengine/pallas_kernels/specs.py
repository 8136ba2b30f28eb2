"""Static descriptions of an op call: what a backend looks at to accept or refuse it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The static side of a `paged_attention` or `packed_attention` call; lengths and tables are data.

    Attributes:
      dtype, kv_dtype: NumPy names of the dtypes of q and of K and V ("bfloat16", "float8_e4m3fn", …).
      page_size: tokens per page; None: no cache (packed attention).
      decode: every row has exactly one query.
      causal: a query sees no later position.
      window: a query at position p sees (p - window, p]; chunk: only positions of its own chunk of this size;
        soft_cap: scores become soft_cap * tanh(score / soft_cap). None: off.
      sinks: per-head logits join the softmax's denominator.
      relative_bias: a bias by the distance of query and key joins the scores.
      kv_scales: K and V are multiplied by dequantisation scales.
    """

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    page_size: int | None = None
    decode: bool = False
    causal: bool = True
    window: int | None = None
    chunk: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    relative_bias: bool = False
    kv_scales: bool = False

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads


@dataclasses.dataclass(frozen=True)
class KVWriteSpec:
    """The static side of a `rope_write_kv` call; fields as in AttentionSpec.

    Attributes:
      rope: q and k are rotated.
      norm_eps: as in RotationSpec.
    """

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    page_size: int = 16
    rope: bool = True
    kv_scales: bool = False
    norm_eps: float | None = None


@dataclasses.dataclass(frozen=True)
class RotationSpec:
    """The static side of a `rope_qkv` call; fields as in AttentionSpec.

    Attributes:
      norm_eps: each head of q and k is RMS-normalised before rotation, this added to its mean square; None: none is.
    """

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    norm_eps: float | None = None


@dataclasses.dataclass(frozen=True)
class GatedSpec:
    """The static side of a `gated_product` call, but for the tokens.

    Attributes:
      hidden: columns of x; mlp: columns of the gate, and of the up projection; dtype: NumPy name of both operands'.
    """

    hidden: int
    mlp: int
    dtype: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class QKVSpec:
    """The static side of a `qkv_product` or `qkv_product_paged` call, but for the tokens; fields as in KVWriteSpec.

    Attributes:
      hidden: columns of x; kv_dtype: None: there are no pages.
      bias: one joins the product.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    kv_dtype: str | None = None
    norm_eps: float | None = None
    bias: bool = False

    @property
    def width(self) -> int:
        """Columns of the projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclasses.dataclass(frozen=True)
class RowNormSpec:
    """The static side of an `rms_norm` or, `centred`, a `layer_norm`, but for the rows.

    Attributes:
      hidden: elements of a row; dtype: NumPy name of all operands'; eps: joins the mean of squares.
    """

    hidden: int
    dtype: str = "bfloat16"
    centred: bool = False
    eps: float = 1e-6


@dataclasses.dataclass(frozen=True)
class EncoderStackSpec:
    """Sizes of a post-norm encoder whose layers one launch computes; mlp: width of the MLP."""

    hidden: int
    heads: int
    mlp: int
    dtype: str
