"""MPNet encoders (arXiv:2004.09297): all-mpnet-base, multi-qa-mpnet and other sentence embedders."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from pjengine.errors import ModelError
from pjengine.models import encoder
from pjengine.models.encoder import BERT_NAMES, EncoderConfig, cache_specs, forward
from pjengine.models.hf_config import HFConfig, required
from pjengine.models.params import ParamSpec
from pjengine.models.roberta import classifier

__all__ = ["Config", "cache_specs", "classifier", "forward", "param_specs"]

_NAMES = dataclasses.replace(
    BERT_NAMES,
    qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    o="attention.attn.o",
    attn_norm="attention.LayerNorm",
)


class Config(EncoderConfig):
    """RoBERTa's encoder without token types, with a bias for each distance of query and key that all layers share.

    A padding token inside a text takes a position like any other token; transformers skips it.
    """

    @classmethod
    def from_hf(cls, hf: HFConfig) -> Self:
        """Reads config.json; ModelError names a field that cannot be honoured."""
        pad = int(required({"pad_token_id": 1, **hf}, "pad_token_id"))
        buckets = int(hf.get("relative_attention_num_buckets", 32))
        if buckets < 4 or buckets % 2:
            raise ModelError(f"relative_attention_num_buckets: expected an even number from 4 on, got {buckets}")
        read = cls.read({**hf, "type_vocab_size": 0}, position_offset=pad + 1)
        return dataclasses.replace(read, relative_buckets=buckets)


def param_specs(config: EncoderConfig) -> dict[str, Any]:
    """Weights by name, as `encoder.param_specs`; relative_bias [buckets, heads]."""
    shape = (config.relative_buckets, config.num_heads)
    bias = ParamSpec(shape, (None, None), ("encoder.relative_attention_bias.weight",))
    return {**encoder.param_specs(config, _NAMES), "relative_bias": bias}
