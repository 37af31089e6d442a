"""Opt-in extensions; each one's code is the file of the same name in ``features/``."""

from __future__ import annotations

from pydantic import Field, model_validator

from latentwire.config.section import Section


class LoraFeature(Section):
    """Low-rank updates of the receivers' own attention. The receivers are then **not frozen**, and results say so."""

    rank: int = Field(8, ge=1, le=512)
    """Rank of each update (arXiv 2106.09685)."""
    alpha: float = Field(16.0, gt=0)
    """Update's scale times ``rank``."""
    targets: tuple[str, ...] = Field(("q_proj", "v_proj"), min_length=1)
    """Names of the linear layers that are updated; not the output head, whose logits may be taken
    in chunks."""


class DeepPrefixFeature(Section):
    """Keys and values of the soft slots in every layer, computed from the latents (arXiv 2110.07602)."""

    hidden: int = Field(128, ge=1, le=8192)
    """Hidden width of the map from latents to keys and values."""
    head_parts: int = Field(1, ge=1, le=64)
    """Parts of a latent that are read by different key-value heads: of n, each makes the keys and values of every n-th
    head, counted through the layers. Facts that share a latent stay apart then (docs/experiments/findings.md); with
    ``encoder.span_parts`` the parts are stretches of its text. ``d_z`` must be a multiple."""


class LatentAdaptersFeature(Section):
    """Gated cross-attention from the receiver's states to the latents, zero at first (arXiv 2204.14198)."""

    depths: tuple[float, ...] = Field((0.5,), min_length=1)
    """After which layers, as fractions of the receiver's depth in (0, 1]."""
    width: int = Field(64, ge=4, le=8192)
    """Width of the attention; a multiple of ``heads``."""
    heads: int = Field(2, ge=1, le=64)
    """Attention heads."""

    @model_validator(mode="after")
    def _parts_fit(self) -> LatentAdaptersFeature:
        if self.width % self.heads or any(not 0 < depth <= 1 for depth in self.depths):
            raise ValueError(
                f"latent_adapters need width as a multiple of heads and depths in (0, 1], got {self.width}, {self.heads}, "
                f"{self.depths}"
            )
        return self


class RefinerFeature(Section):
    """Self-attention among the latents before the adapters, the identity at first."""

    layers: int = Field(1, ge=1, le=32)
    """Transformer layers."""
    heads: int = Field(4, ge=1, le=64)
    """Attention heads; ``d_z`` must be a multiple of 2 × heads."""


class CoprocessorFeature(Section):
    """A small transformer that reads latents and question and augments the slots' keys and values (arXiv 2412.17747)."""

    width: int = Field(64, ge=8, le=8192)
    """Width of the coprocessor; a multiple of 2 × heads."""
    layers: int = Field(1, ge=1, le=32)
    """Transformer layers."""
    heads: int = Field(2, ge=1, le=64)
    """Attention heads."""

    @model_validator(mode="after")
    def _parts_fit(self) -> CoprocessorFeature:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width must be a multiple of 2 × heads, got width {self.width}, heads {self.heads}"
            )
        return self


class FeaturesConfig(Section):
    """Extensions, each off unless it is named. One file each in ``features/``."""

    lora: LoraFeature | None = None
    """Low-rank updates of the receivers (not frozen any more)."""
    deep_prefix: DeepPrefixFeature | None = None
    """Per-layer keys and values for the slots."""
    latent_adapters: LatentAdaptersFeature | None = None
    """Gated cross-attention to the latents."""
    refiner: RefinerFeature | None = None
    """Self-attention among the latents."""
    coprocessor: CoprocessorFeature | None = None
    """Question-aware augmentation of the slots' keys and values."""
