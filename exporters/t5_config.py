"""The configuration of transformers' `T5EncoderModel`, validated before any module is built from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adacorr_deploy.core.errors import UnsupportedModelError
from adacorr_deploy.core.prompts import MAX_VOCABULARY
from adacorr_deploy.core.untrusted import first_fault

_Width = Annotated[int, Field(ge=1, le=65536, strict=True)]
_OTHERWISE: Final = "Give another encoder with --text-encoder PATH, or build with --no-text-encoder."


class T5Config(BaseModel):
    """The fields that shape the encoder; others of a config.json (the decoder's, generation's) change nothing in it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model_type: Literal["t5"]
    vocab_size: Annotated[int, Field(ge=1, le=MAX_VOCABULARY, strict=True)] = 32128
    d_model: _Width = 512
    d_kv: _Width = 64
    d_ff: _Width = 2048
    num_layers: Annotated[int, Field(ge=1, le=256, strict=True)] = 6
    num_heads: Annotated[int, Field(ge=1, le=1024, strict=True)] = 8
    relative_attention_num_buckets: Annotated[int, Field(ge=4, le=4096, multiple_of=4, strict=True)] = 32
    relative_attention_max_distance: Annotated[int, Field(ge=2, le=65536, strict=True)] = 128
    layer_norm_epsilon: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1e-6
    feed_forward_proj: Literal["relu", "gelu", "gated-gelu", "gated-silu"] = "relu"

    @classmethod
    def checked(cls, raw: Mapping[str, object], *, where: str) -> T5Config:
        """Validate a config.

        Raises:
            UnsupportedModelError: Naming the first field that has no compiled form, and what is allowed.
        """
        try:
            config = cls.model_validate(raw)
        except ValidationError as error:
            raise UnsupportedModelError(f"{where}: {first_fault(error)}. {_OTHERWISE}") from error
        exact = config.relative_attention_num_buckets // 4
        if config.relative_attention_max_distance <= exact:
            raise UnsupportedModelError(
                f"{where}: relative_attention_max_distance is {config.relative_attention_max_distance}, allowed is "
                f"more than a quarter of relative_attention_num_buckets, {exact}. {_OTHERWISE}"
            )
        return config
