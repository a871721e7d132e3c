"""What model.json says of a Detectron2 network; needs no Detectron2."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

# The largest size or count that a saved model may ask for.
MOST = 20_000


class Detectron2Architecture(BaseModel):
    """``config``: where the settings began, a model zoo name or a file; ``settings``: what differs from the defaults."""

    model_config = ConfigDict(extra="forbid")

    config: str = Field(max_length=1000)
    settings: dict[str, Any] = Field(max_length=2000)

    @field_validator("settings")
    @classmethod
    def bounded(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Sizes and counts of the network and its input."""
        for key, value in settings.items():
            numbers = value if isinstance(value, (list, tuple)) else [value]
            if key.startswith(("MODEL.", "INPUT.")) and any(isinstance(n, int) and abs(n) > MOST for n in numbers):
                raise ValueError(f"{key} is larger than {MOST:,}")
        return settings
