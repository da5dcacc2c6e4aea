"""The vision encoder of V4.1-Flash and of V4-Flash-Vision-Exp: sizes, and names of its tensors.

dsv4 converts these tensors and computes nothing with them.
"""

from __future__ import annotations

import dataclasses

from dsv4_convert.spec.config import Count
from dsv4_convert.spec.names import Kind, Rule, Section, Transform, When

WITH_VISION = When("all, with a vision encoder", lambda config, layer: config.vision is not None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The numbers of the encoder, under the names that V4.1's ``vision_config`` gives them."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    patch_size: int
    downsample_ratio: int
    max_image_tokens: int
    min_pixels: int
    rope_theta: float
    max_wh_ratio: float | None
    #: The id that stands for every token of an image; None where images have ids beyond the vocabulary.
    image_token_id: Count | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """The symbols of the ``shape`` column of the encoder's rows."""
        width = self.hidden_size
        return {
            "Dv": width,
            "3Dv": 3 * width,
            "Iv": self.intermediate_size,
            "2Iv": 2 * self.intermediate_size,
            "3pp": 3 * self.patch_size**2,
            "ddDv": self.downsample_ratio**2 * width,
        }


def _row(path: str, shape: str, kind: Kind, transform: Transform, *, weight: bool) -> Rule:
    published = path + (".weight" if weight else "")
    return Rule(
        path=path, published=published, shape=shape, kind=kind, transform=transform,
        section=Section.VISION, when=WITH_VISION,
    )  # fmt: skip


def _matrix(path: str, shape: str) -> Rule:
    return _row(path, shape, Kind.PLAIN, Transform.TRANSPOSE, weight=True)


def _biased(path: str, shape: str) -> tuple[Rule, Rule]:
    """A linear map with a bias."""
    return (
        _row(f"{path}.weight", shape, Kind.PLAIN, Transform.TRANSPOSE, weight=False),
        _row(f"{path}.bias", shape.split()[0], Kind.PLAIN, Transform.NONE, weight=False),
    )


def _norm(path: str) -> Rule:
    return _row(path, "Dv", Kind.NORM, Transform.NONE, weight=True)


def vision_rules(*learned: str) -> tuple[Rule, ...]:
    """The rows of the encoder; ``learned`` are the embeddings ``image_…`` that stand between the parts of an image."""
    return (
        *_biased("vision.patch_embed.proj", "Dv 3pp"),
        _norm("vision.blocks.{}.norm1"),
        *_biased("vision.blocks.{}.attn.wqkv", "3Dv Dv"),
        *_biased("vision.blocks.{}.attn.wo", "Dv Dv"),
        _norm("vision.blocks.{}.norm2"),
        _matrix("vision.blocks.{}.mlp.w1", "2Iv Dv"),
        _matrix("vision.blocks.{}.mlp.w2", "Dv Iv"),
        _norm("vision.norm"),
        *_biased("aligner.w1", "D ddDv"),
        *_biased("aligner.w2", "D D"),
        *(_row(f"image_{part}", "D", Kind.PLAIN, Transform.NONE, weight=False) for part in learned),
    )
