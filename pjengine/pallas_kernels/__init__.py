"""Attention and KV-cache ops over one ragged batch, and an MLP's first half: public functions, references, kernels."""

from pjengine.pallas_kernels.describe import describe_backends, describe_embedder_backends
from pjengine.pallas_kernels.encoder_stack.api import encoder_stack, serves_encoder_stack
from pjengine.pallas_kernels.encoder_stack.packing import pack_layers
from pjengine.pallas_kernels.gated_mlp.api import gated_product, serves_gated_product
from pjengine.pallas_kernels.kv_write.api import rope_write_kv, rope_write_kv_qkv
from pjengine.pallas_kernels.packed.api import packed_attention, packed_attention_qkv
from pjengine.pallas_kernels.paged.api import paged_attention, paged_attention_qkv
from pjengine.pallas_kernels.qkv_projection.api import Projection, qkv_product, qkv_product_paged, serves_qkv_product
from pjengine.pallas_kernels.qkv_rotation.api import rope_qkv
from pjengine.pallas_kernels.rope import apply_rope
from pjengine.pallas_kernels.row_norm.api import layer_norm, rms_norm

__all__ = [
    "Projection",
    "apply_rope",
    "describe_backends",
    "describe_embedder_backends",
    "encoder_stack",
    "gated_product",
    "layer_norm",
    "pack_layers",
    "packed_attention",
    "packed_attention_qkv",
    "paged_attention",
    "paged_attention_qkv",
    "qkv_product",
    "qkv_product_paged",
    "rms_norm",
    "rope_qkv",
    "rope_write_kv",
    "rope_write_kv_qkv",
    "serves_encoder_stack",
    "serves_gated_product",
    "serves_qkv_product",
]
