"""What the model.json of a twin says; reading it needs neither OpenVINO nor torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.engines.unet.settings import CropSettings
from models.runtime.devices import TwinPrecision


class ImageInput(BaseModel):
    """How an image becomes a detector's input: resized, normalised, padded."""

    model_config = ConfigDict(extra="forbid")

    zoom: float | None = Field(default=None, gt=0, le=8, description="Factor of the size; null: by min_size and max_size.")
    min_size: int = Field(default=800, ge=0, le=100_000, description="Length of the shorter side; 0: as it is.")
    max_size: int = Field(default=1333, ge=1, le=100_000, description="Largest length of the longer side.")
    resampling: Literal["linear", "antialias", "pillow"] = Field(
        default="linear",
        description="linear: bilinear; antialias: widened when shrinking; pillow: Pillow's, of whole numbers.",
    )
    bgr: bool = Field(default=False, description="Blue first.")
    scale: float = Field(default=255.0, gt=0, description="Pixels are divided by this.")
    mean: list[float] = Field(min_length=3, max_length=3, description="Then it is subtracted, channel by channel.")
    std: list[Annotated[float, Field(gt=0)]] = Field(min_length=3, max_length=3, description="Divides the rest.")
    masks: Literal["torchvision", "detectron2"] = Field(
        default="torchvision", description="Whose way masks of boxes are drawn into the image."
    )
    divisor: int = Field(default=32, ge=0, le=1024, description="Sides are padded with zeros to a multiple of it.")


class TwinArchitecture(BaseModel):
    """A network that was converted, and whose."""

    model_config = ConfigDict(extra="forbid")

    precision: TwinPrecision = Field(description="What it computes in; the geometry of boxes in float32.")
    parent_engine: str = Field(max_length=64, description="Engine of the model that it was converted from.")
    parent_digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="Digest of that model's saved folder.")
    image: ImageInput | None = Field(default=None, description="Of a detector: its input.")
    crop: CropSettings | None = Field(default=None, description="Of a segmenter: its input and what becomes of its output.")

    @model_validator(mode="after")
    def one_input(self) -> TwinArchitecture:
        """A detector takes images, a segmenter crops."""
        if (self.image is None) == (self.crop is None):
            raise ValueError("expected either image or crop")
        return self
