"""The configuration of transformers' `T5EncoderModel`, validated before any module is built from it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from adacorr_deploy.core.prompts import MAX_VOCABULARY
from adacorr_deploy.exporters.model_config import ModelConfig, Size


class T5Config(ModelConfig):
    """The fields that shape the encoder; others of a config.json (the decoder's, generation's) change nothing in it."""

    otherwise: ClassVar[str] = "Give another encoder with --text-encoder PATH, or build with --no-text-encoder."

    model_type: Literal["t5"]
    vocab_size: Annotated[int, Field(ge=1, le=MAX_VOCABULARY, strict=True)] = 32128
    d_model: Size = 512
    d_kv: Size = 64
    d_ff: Size = 2048
    num_layers: Annotated[int, Field(ge=1, le=256, strict=True)] = 6
    num_heads: Annotated[int, Field(ge=1, le=1024, strict=True)] = 8
    relative_attention_num_buckets: Annotated[int, Field(ge=4, le=4096, multiple_of=4, strict=True)] = 32
    relative_attention_max_distance: Annotated[int, Field(ge=2, le=65536, strict=True)] = 128
    layer_norm_epsilon: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1e-6
    feed_forward_proj: Literal["relu", "gelu", "gated-gelu", "gated-silu"] = "relu"

    def refusal(self) -> str | None:
        exact = self.relative_attention_num_buckets // 4
        if self.relative_attention_max_distance <= exact:
            return (
                f"relative_attention_max_distance is {self.relative_attention_max_distance}, allowed is more than a "
                f"quarter of relative_attention_num_buckets, {exact}"
            )
        return None
