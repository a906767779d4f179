"""What configurations of models share: they are validated before any module is built from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adacorr_deploy.core.errors import UnsupportedModelError
from adacorr_deploy.core.untrusted import first_fault

if TYPE_CHECKING:
    from typing_extensions import Self

Size = Annotated[int, Field(ge=1, le=65536, strict=True)]
Count = Annotated[int, Field(ge=1, le=1024, strict=True)]  # channels, or features of a head
Layers = Annotated[int, Field(ge=1, le=512, strict=True)]
Side = Annotated[int, Field(ge=1, le=4096, strict=True)]
Patch = Annotated[int, Field(ge=1, le=64, strict=True)]
Epsilon = Annotated[float, Field(gt=0, lt=1)]
Activation = Literal["gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu"]


class ModelConfig(BaseModel):
    """The fields of a config.json that shape a model; others (dropout, …) change nothing at inference."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    otherwise: ClassVar[str] = "Use a model without this feature."  # what to do where a field is refused

    @classmethod
    def checked(cls, raw: Mapping[str, object], *, where: str) -> Self:
        """Validate a config.

        Raises:
            UnsupportedModelError: Naming the first field that has no compiled form, or fields that don't go together,
                and what is allowed.
        """
        try:
            config = cls.model_validate(raw)
        except ValidationError as error:
            raise UnsupportedModelError(f"{where}: {first_fault(error)}. {cls.otherwise}") from error
        if reason := config.refusal():
            raise UnsupportedModelError(f"{where}: {reason}. {cls.otherwise}")
        return config

    def refusal(self) -> str | None:
        """Return why these fields don't go together, or None."""
        return None


class PatchTransformerConfig(ModelConfig):
    """What diffusers' transformers over patches of latents share, with the defaults that most of them have."""

    otherwise: ClassVar[str] = "Check the configuration, or use a model without this feature."

    num_attention_heads: Annotated[int, Field(ge=1, le=256, strict=True)] = 16
    attention_head_dim: Count = 72
    in_channels: Count = 4
    out_channels: Size | None = None
    num_layers: Layers = 28
    attention_bias: bool = True
    sample_size: Side = 32
    patch_size: Patch = 2
    activation_fn: Activation = "gelu-approximate"
    norm_eps: Epsilon = 1e-5

    @property
    def width(self) -> int:
        """Features of a token, D."""
        return self.num_attention_heads * self.attention_head_dim

    def refusal(self) -> str | None:
        if self.sample_size % self.patch_size:
            return f"patch_size {self.patch_size} doesn't divide sample_size {self.sample_size}"
        if self.out_channels not in (None, self.in_channels, 2 * self.in_channels):
            return (
                f"out_channels {self.out_channels} is neither in_channels {self.in_channels} (noise) "
                "nor twice that (noise and variance)"
            )
        if self.width % 4:
            return f"width {self.width} isn't a multiple of 4, as the position embedding needs"
        return None
