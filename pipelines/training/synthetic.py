"""The drawn airfields of a recipe: beside the folder of the training, where other trainings find them."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from pipelines.data.loading.batches import OtherWindows
from pipelines.data.readers.opening import open_dataset
from pipelines.data.synthetic.scenes import AirfieldSettings, prepare_airfield
from pipelines.recipes.settings import DetectorRecipe, Detectron2Recipe, MaskRecipe, SyntheticSettings, WindowSettings

log = logging.getLogger(__name__)

# Of what a class of planes is called.
PLANES = ("plane", "aircraft", "jet", "fighter", "airliner")


def draw_scenes(recipe: DetectorRecipe | MaskRecipe | Detectron2Recipe, folder: Path) -> None:
    """Draw what the recipe asks for, unless that is done; one process does it, and others of the same settings wait.

    A warning is given where the class of the data does not sound like planes: the drawn ones would be taught as it.

    Args:
        folder: of the training.

    Raises:
        PlanesError: the scenes cannot be written.
    """
    if recipe.synthetic is not None:
        place = _place(recipe.synthetic, folder)
        if not any(word in recipe.data.category.lower() for word in PLANES):
            log.warning(
                f"synthetic: the drawn windows show planes, which are taught as {recipe.data.category!r}; "
                "set synthetic=null to train without them"
            )
        if prepare_airfield(place, _airfield(recipe.synthetic)):
            log.info(f"{recipe.synthetic.scenes} synthetic scenes drawn in {place}")


def drawn_windows(recipe: WindowSettings, folder: Path, zoom: float = 1.0) -> OtherWindows | None:
    """The scenes that `draw_scenes` drew, as `DetectorBatches` takes them; ``zoom``: of the network, on top of theirs."""
    settings = recipe.synthetic
    if settings is None:
        return None
    # Neither the class of the data nor its range of values: these are planes in 8 bits, whatever it holds.
    return OtherWindows(open_dataset(str(_place(settings, folder)), "train"), settings.share, settings.zoom * zoom)


def _place(settings: SyntheticSettings, folder: Path) -> Path:
    content = json.dumps(settings.model_dump(exclude={"share", "zoom"}), sort_keys=True)
    return folder.parent / f"synthetic-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def _airfield(settings: SyntheticSettings) -> AirfieldSettings:
    least, greatest = settings.lengths
    return AirfieldSettings(
        train=settings.scenes,
        test=0,
        length_min=least,
        length_max=greatest,
        fighters=settings.fighters,
        seed=settings.seed,
    )
