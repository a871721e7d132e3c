"""Settings of a segmenter of crops; reading them needs no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class CropSettings(BaseModel):
    """How a crop becomes a network's input, and the network's output a mask."""

    model_config = ConfigDict(extra="forbid")

    crop_size: int = Field(
        default=128, ge=32, le=1024, multiple_of=32, description="Side in pixels to which a crop is resized."
    )
    margin: float = Field(default=0.0, ge=0, le=1, description="Share of the box added on each side.")
    threshold: float = Field(default=0.5, gt=0, lt=1, description="Least probability of a pixel of the mask.")
    flips: bool = Field(default=False, description="Average the probabilities over the four mirror images.")
    normalisation: Literal["imagenet", "crop"] = Field(
        default="imagenet",
        description=(
            "By ImageNet's statistics, as pretrained encoders expect, or by each crop's own mean and deviation, which "
            "makes dark and pale planes alike."
        ),
    )


class SegmenterArchitecture(CropSettings):
    """Everything that decides the network and how a crop becomes a mask."""

    network: str = Field(
        default="unet",
        max_length=100,
        description=(
            "skipnet, or an architecture of segmentation-models-pytorch such as unet, unetplusplus, fpn, deeplabv3plus."
        ),
    )
    encoder: str = Field(default="resnet18", max_length=100, description="Encoder of segmentation-models-pytorch.")
    decoder_channels: list[Annotated[int, Field(ge=1, le=4096)]] | None = Field(
        default=None, max_length=10, description="Its parameter of that name, for architectures that have it."
    )

    @property
    def engine(self) -> Literal["smp", "skipnet"]:
        """Which library builds the network."""
        return "skipnet" if self.network == "skipnet" else "smp"
