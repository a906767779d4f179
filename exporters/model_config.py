"""What the families' configurations share: they are validated before any module is built from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adacorr_deploy.core.errors import UnsupportedModelError
from adacorr_deploy.core.untrusted import clipped

if TYPE_CHECKING:
    from typing_extensions import Self

Size = Annotated[int, Field(ge=1, le=65536, strict=True)]
Activation = Literal["gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu"]


class ModelConfig(BaseModel):
    """The fields of a config.json that shape a model; others (dropout, …) change nothing at inference."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    @classmethod
    def checked(cls, raw: Mapping[str, object], *, where: str) -> Self:
        """Validate a config.

        Raises:
            UnsupportedModelError: Naming the first field that has no compiled form, and what is allowed.
        """
        try:
            config = cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(step) for step in first["loc"])
            raise UnsupportedModelError(
                f"{where}: {field} = {clipped(first['input'])} is not supported: {first['msg']}. "
                "Use a model without this feature."
            ) from error
        if reason := config.refusal():
            raise UnsupportedModelError(f"{where}: {reason}. Check the configuration.")
        return config

    def refusal(self) -> str | None:
        """Return why these fields don't go together, or None."""
        return None
