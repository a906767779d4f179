"""From a request's fields to what is sampled: every value checked before anything waits or runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic import Field as Allowed

from adacorr_deploy.caching.policy import PRESETS, Policy, policy_from_file, policy_named
from adacorr_deploy.core.errors import PolicyError, RequestError
from adacorr_deploy.core.manifest import PRESET_PATTERN, Manifest
from adacorr_deploy.core.prompts import checked_prompt
from adacorr_deploy.core.samplers import MAX_GUIDANCE, Sampler
from adacorr_deploy.core.specs import PromptSpec
from adacorr_deploy.core.untrusted import clipped, first_fault
from adacorr_deploy.runtime.conditions import Prompts, check_negative
from adacorr_deploy.runtime.image_size import latent_size
from adacorr_deploy.runtime.images import gives_images
from adacorr_deploy.runtime.request import MAX_SEED, SampleRequest, check_integer, check_request
from adacorr_deploy.serving.prompt_desk import Texts
from adacorr_deploy.serving.settings import POLICIES_DIR, Quality, ServingSettings
from adacorr_deploy.serving.tensors import IMAGE_NAMES, Field, inputs_for

_MAX_TIMEOUT_MS: Final = 24 * 3600 * 1000
_NUMPY: Final = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)


class SampleFields(BaseModel):
    """What a client may ask for; ranges that depend on the model are checked after this."""

    model_config = _NUMPY

    class_labels: Annotated[list[int], Allowed(min_length=1)] | None = None
    prompts: Annotated[list[str], Allowed(min_length=1)] | None = None
    negative_prompts: Annotated[list[str], Allowed(min_length=1)] | None = None
    prompt_embeddings: NDArray[np.float32] | None = None
    prompt_mask: NDArray[np.int64] | None = None
    negative_embeddings: NDArray[np.float32] | None = None
    negative_mask: NDArray[np.int64] | None = None
    size: list[int] | None = None
    frames: int | None = None
    frame_rate: float | None = None
    seed: Annotated[int, Allowed(ge=0, le=MAX_SEED)] = 0
    steps: Annotated[int, Allowed(ge=1)] | None = None
    guidance: Annotated[float, Allowed(ge=1, le=MAX_GUIDANCE)] | None = None
    sampler: Sampler | None = None
    eta: Annotated[float, Allowed(ge=0, le=1)] = 0.0
    policy: Annotated[str, Allowed(min_length=1, max_length=80)] | None = None
    quality: Quality | None = None
    latents: NDArray[np.float32] | None = None
    outputs: Annotated[list[str], Allowed(min_length=1, max_length=len(IMAGE_NAMES))] | None = None
    timeout_ms: Annotated[int, Allowed(ge=1, le=_MAX_TIMEOUT_MS)] | None = None
    preview_every: Annotated[int, Allowed(ge=0, le=1000)] = 0


def _blank(spec: PromptSpec, count: int) -> Prompts:
    """Return what stands for prompts that are not encoded yet, to check the request with; it takes no memory."""
    shape = (count, spec.tokens)
    return Prompts(
        embeddings=np.broadcast_to(np.float32(0), (*shape, spec.width)), mask=np.broadcast_to(np.int64(1), shape)
    )


def _given(embeddings: NDArray[np.float32] | None, mask: NDArray[np.int64] | None, name: str) -> Prompts:
    if embeddings is None or mask is None:
        raise RequestError(f"{name}_embeddings and {name}_mask go together, and one of them is missing.")
    return Prompts(embeddings=embeddings, mask=mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A request that can be sampled.

    Attributes:
        request: What to sample; with blank prompts where `texts` are to be encoded first.
        policy: How.
        outputs: Names of the image tensors that the client wants.
        timeout_seconds: From its arrival; None waits as long as it takes.
        preview_every: Steps between two previews; 0 for none.
        texts: Of requests with prompts.
    """

    request: SampleRequest
    policy: Policy
    outputs: tuple[str, ...]
    timeout_seconds: float | None
    preview_every: int
    texts: Texts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderBook:
    """What orders are checked against."""

    manifest: Manifest
    settings: ServingSettings
    policies: Mapping[str, Policy]  # files of the repository, by their names

    @classmethod
    def of_repository(cls, manifest: Manifest, settings: ServingSettings, folder: Path) -> OrderBook:
        """Read the policy files of a model's version folder, and check the tiers.

        Raises:
            PolicyError: If a file or a tier's policy is not valid.
        """
        files = {
            name: policy_from_file(folder / POLICIES_DIR / file).model_copy(update={"name": name})
            for name, file in settings.policies.items()
        }
        for name in settings.quality.values():
            policy_named(name)
        return cls(manifest=manifest, settings=settings, policies=files)

    def order(self, fields: Mapping[str, Field], *, wanted: Sequence[str] = ()) -> Order:
        """Check a request's fields.

        Args:
            fields: As the client gave them.
            wanted: Image tensors that the client asked the server for, where the request has no `outputs`.

        Raises:
            RequestError: If a field is unknown, missing or out of range; the message says which, and what is allowed.
            PolicyError: If the policy is neither a preset nor one of the repository's files.
        """
        try:
            given = SampleFields.model_validate(fields)
        except ValidationError as error:
            raise RequestError(f"{first_fault(error)}.") from error
        defaults, model = self.settings.defaults, self.manifest.model
        self._check_taken(given)
        request = SampleRequest(
            labels=self._labels(given),
            prompts=self._prompts(given),
            size=latent_size(self.manifest, pixels=given.size, frames=given.frames),
            frame_rate=given.frame_rate,
            steps=defaults.steps if given.steps is None else given.steps,
            guidance=defaults.guidance if given.guidance is None else given.guidance,
            seed=given.seed,
            sampler=given.sampler or defaults.sampler,
            latents=given.latents,
            eta=given.eta,
        )
        check_request(request, model, self.manifest.schedule)
        check_negative(request, has_null_prompt=self.manifest.null_prompt is not None)
        texts = None
        if given.prompts is not None:
            texts = Texts(prompts=tuple(given.prompts), negative=tuple(given.negative_prompts or ()))
        return Order(
            request=request,
            policy=self._policy(given),
            outputs=self._outputs(given.outputs, wanted),
            timeout_seconds=None if given.timeout_ms is None else given.timeout_ms / 1000,
            preview_every=given.preview_every,
            texts=texts,
        )

    def _check_taken(self, given: SampleFields) -> None:
        """Refuse what the model doesn't take; a server refuses most of it before."""
        taken = {field.name for field in inputs_for(self.manifest)}
        for name in ("class_labels", "prompts", "prompt_embeddings"):
            if getattr(given, name) is not None and name not in taken:
                known = [each for each in ("class_labels", "prompts", "prompt_embeddings") if each in taken]
                raise RequestError(f"{name} is given, and this model takes none. It takes {' or '.join(known)}.")

    def _labels(self, given: SampleFields) -> tuple[int, ...]:
        classes = self.manifest.model.num_classes
        if not classes:
            return ()
        if given.class_labels is None:
            raise RequestError(f"class_labels: Field required, whole numbers from 0 to {classes - 1}, one per image.")
        check_integer("the number of class_labels", len(given.class_labels), 1, self.settings.limits.max_images)
        for index, label in enumerate(given.class_labels):
            check_integer(f"class_labels[{index}]", label, 0, classes - 1)
        return tuple(given.class_labels)

    def _prompts(self, given: SampleFields) -> Prompts | None:
        """Return the embeddings that were given; for prompts, which are encoded later, as many blank ones."""
        spec = self.manifest.model.conditions.prompt
        if spec is None:
            return None
        if (given.prompts is None) == (given.prompt_embeddings is None):
            either = "prompt_embeddings and prompt_mask"
            what = f"prompts, or {either}" if self.manifest.text_encoder is not None else either
            raise RequestError(f"Both prompts and embeddings, or neither, were given; allowed are {what}.")
        negatives = given.negative_prompts, given.negative_embeddings
        if all(each is not None for each in negatives):
            raise RequestError("negative_prompts and negative_embeddings were both given. Give one of them.")
        if given.prompts is not None:
            for name, texts in (("prompts", given.prompts), ("negative_prompts", given.negative_prompts or [])):
                for index, text in enumerate(texts):
                    checked_prompt(text, field=f"{name}[{index}]")
            if (
                given.negative_embeddings is not None
                or given.negative_mask is not None
                or given.prompt_mask is not None
            ):
                raise RequestError("prompts go with negative_prompts, embeddings with masks and negative_embeddings.")
            prompts = _blank(spec, len(given.prompts))
            if given.negative_prompts is not None:
                prompts = replace(prompts, negative=_blank(spec, len(given.negative_prompts)))
        else:
            if given.negative_prompts is not None:
                raise RequestError("prompts go with negative_prompts, embeddings with masks and negative_embeddings.")
            prompts = _given(given.prompt_embeddings, given.prompt_mask, "prompt")
            if given.negative_embeddings is not None or given.negative_mask is not None:
                negative = _given(given.negative_embeddings, given.negative_mask, "negative")
                prompts = replace(prompts, negative=negative)
        check_integer("the number of prompts", len(prompts), 1, self.settings.limits.max_images)
        return prompts

    def _policy(self, given: SampleFields) -> Policy:
        if given.policy is None:
            return policy_named(self.settings.quality[given.quality or Quality.BALANCED])
        if given.quality is not None:
            raise RequestError("policy and quality were both given; each names a policy. Give one of them.")
        if given.policy in self.policies:
            return self.policies[given.policy]
        preset, *_ = re.split(r"[@+]", given.policy)
        if preset not in PRESETS or not re.fullmatch(PRESET_PATTERN, given.policy):  # never a path
            known = ", ".join([*PRESETS, *self.policies])
            raise PolicyError(
                f"policy is {clipped(given.policy)}, allowed are {known}, presets with a target as in robust@2.5, and "
                "with AdaCorrection or revision on top as in fora@3+adacorrection@2 and fbcache+revised."
            )
        return policy_named(given.policy)

    def _outputs(self, asked: Sequence[str] | None, wanted: Sequence[str]) -> tuple[str, ...]:
        drawable = gives_images(self.manifest)
        names = asked or wanted or [IMAGE_NAMES[0] if drawable else "latents"]
        for name in names:
            if name not in IMAGE_NAMES:
                raise RequestError(f"outputs holds {clipped(name)}, allowed are {', '.join(IMAGE_NAMES)}.")
            if not drawable and name != "latents":
                raise RequestError(
                    f"outputs holds {name}, allowed is latents: this model's latents have "
                    f"{self.manifest.model.latent_shape[0]} channels, and the bundle holds no decoder."
                )
        return tuple(dict.fromkeys(names))
