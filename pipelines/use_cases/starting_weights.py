"""What a training starts from: a registered version, a file, or what a library knows by a name."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path

from models.errors import ModelError, PlanesError
from models.saved.allowed_files import WEIGHTS_FILE
from models.saved.spec import read_spec
from pipelines.data.dataset import Dataset
from pipelines.recipes.settings import Detectron2Recipe, Recipe, UNetRecipe
from pipelines.registry.lineage import read_training_images
from pipelines.registry.model_versions import Registry
from pipelines.registry.training_images import TrainingImages, united

log = logging.getLogger(__name__)

REGISTERED = "models:/"
LIBRARY = ("none", "imagenet", "coco", "zoo")


@dataclass(frozen=True)
class Start:
    """Weights to start from.

    Attributes:
        name: as the recipe says; a version by its number, whatever alias led to it.
        local: what an engine loads, a path or a name that its library knows.
        digest: SHA-256 of a file's bytes; empty for what a library knows.
        version: the registered version, such as ``planes-det/3``.
        model_id: of its logged model.
        images: what the version was trained on, in part unknown.
    """

    name: str
    local: str
    digest: str = ""
    version: str = ""
    model_id: str | None = None
    images: TrainingImages = field(default_factory=TrainingImages)

    def warn_of(self, test: Dataset | None) -> None:
        """Warn where test images are among those that the weights come from."""
        shared = self.images.shared_with(test) if test is not None and self.images.images else []
        if test is not None and shared:
            log.warning(
                f"weights {self.name}: were trained or validated on {len(shared)} of the {len(test)} test images "
                f"(such as {shared[0]}), so that test metrics are too good"
            )


def starting_weights(recipe: Recipe, registry: Registry | None = None) -> Start:
    """Find what a recipe starts from; of a registered version, its files.

    Args:
        registry: where versions are; that of the environment where it is None.

    Raises:
        ModelError: no such file, or a version of another engine.
        RegistryError: no such version, or its files are gone.
    """
    weights = recipe.weights
    if weights.startswith(REGISTERED):
        return _registered(recipe, registry or Registry.connect())
    if not _is_path(recipe):
        unknown = [f"weights {weights}"] if "://" in weights else []
        return Start(weights, weights, images=TrainingImages(unknown=unknown))
    path = Path(weights)
    path = path / WEIGHTS_FILE if path.is_dir() else path
    if not path.is_file():
        raise ModelError(
            f"weights {weights}: no such file; give a local path, models:/NAME/VERSION, none, or what the library knows"
        )
    return Start(weights, weights, _digest(path), images=TrainingImages(unknown=[f"weights {weights}"]))


def _is_path(recipe: Recipe) -> bool:
    weights = recipe.weights
    if "://" in weights or weights in LIBRARY:
        return False
    if isinstance(recipe, UNetRecipe) and recipe.architecture.network != "skipnet":
        # Other names are those of segmentation-models-pytorch.
        return "/" in weights or weights.endswith((".pth", ".safetensors"))
    return True


def _registered(recipe: Recipe, registry: Registry) -> Start:
    resolved = registry.resolve(recipe.weights)
    name = f"{REGISTERED}{resolved.label}"
    folder = registry.fetch(resolved)
    made_by, wanted = read_spec(folder).engine, _engine(recipe)
    if made_by != wanted:
        raise ModelError(f"weights {name}: a model of {made_by}; recipe {recipe.name} trains one of {wanted}")
    try:
        images = read_training_images(registry, resolved)
    except PlanesError as error:
        log.warning(f"weights {name}: what they were trained on cannot be read ({error})")
        images = None
    known = united({f"weights {name}": images})
    return Start(name, str(folder), _digest(folder / WEIGHTS_FILE), resolved.label, resolved.model_id, known)


def _engine(recipe: Recipe) -> str:
    if isinstance(recipe, UNetRecipe):
        return recipe.architecture.engine
    return "detectron2" if isinstance(recipe, Detectron2Recipe) else "torchvision"


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"weights {path}: cannot be read ({error.strerror})") from error
