"""The folder that the pages' commands are run in: the data that they name in miniature, versions trained in seconds."""

from __future__ import annotations

import base64
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from pipelines.data.synthetic.scenes import AirfieldSettings, prepare_airfield
from pipelines.recipes.reading import load_recipe
from tests.journeys.conftest import Project
from tests.pages.blocks import ROOT
from tests.pages.substitutions import CROPS, FEW

# Gates that let pass what has learnt nothing; what gates do has tests of its own.
GATES = {
    "data": [{"path": "data/airfield", "split": "test"}],
    "gates": {"production": {}},
    "accelerate": {name: {"max_loss": 1, "min_speedup": 1e-6} for name in ("f32", "bf16", "int8")},
}
MODELS = ("planes-det", "planes-unet", "planes-inst", "planes-mask")
SPLITS = {"train": 6, "test": 2}
SIZE = 256


def make_data(folder: Path) -> None:
    """Every file and folder that a page names as the reader's own."""
    airfield = folder / "data" / "airfield"
    settings = AirfieldSettings(**SPLITS, size=SIZE, planes_min=4, planes_max=6, length_max=60, seed=1)
    prepare_airfield(airfield, settings)
    # It is somebody's data then, and the demo takes it as it is.
    (airfield / "airfield.json").unlink()
    for name in ("path/to/yours", "mine", "data/new"):
        shutil.copytree(airfield, folder / name)
    _dota(airfield, folder / "path" / "to" / "dota")
    _course(airfield, folder / "path" / "to" / "isaid")
    for name in ("path/to/scenes", "scenes", "harbour"):
        _georeferenced(airfield, folder / name)
    images = sorted((airfield / "test").glob("*.png"))
    for name in ("photos", "survey"):
        (folder / name).mkdir()
        for image in images:
            cv2.imwrite(str(folder / name / f"{image.stem}.jpg"), cv2.imread(str(image)))
    pd.DataFrame({"path": [str(image.relative_to(folder)) for image in images]}).to_parquet(folder / "list.parquet")
    shutil.copy(images[0], folder / "A0005.png")
    rows = {"columns": ["image"], "data": [[base64.b64encode(images[0].read_bytes()).decode()]]}
    (folder / "input.json").write_text(json.dumps({"dataframe_split": rows}))
    (folder / "gates").mkdir()
    for name in MODELS:
        # JSON is YAML.
        (folder / "gates" / f"{name}.yaml").write_text(json.dumps(GATES))
    _weights(folder / "output" / "model_final.pth")
    for name in ("MLproject", "conda.yaml", "requirements.txt"):
        shutil.copy(ROOT / name, folder)


def _weights(path: Path) -> None:
    """What a training with Detectron2 outside of this project leaves; without Detectron2 none."""
    if not find_spec("detectron2"):
        return
    import torch

    from models.engines.detectron2.predictor import build_network
    from pipelines.training.detectron2.trainer import training_config

    path.parent.mkdir()
    cfg = training_config(load_recipe("demo_detector_detectron2"), path.parent, "cpu")
    torch.save({"model": build_network(cfg, "cpu").state_dict(), "iteration": 9}, path)


def _content(airfield: Path, split: str) -> dict:
    return json.loads((airfield / f"{split}_coco.json").read_text())


def _dota(airfield: Path, folder: Path) -> None:
    """Names that tell scenes by their first five characters."""
    number = 0
    for split in SPLITS:
        content = _content(airfield, split)
        (folder / split).mkdir(parents=True)
        for image in content["images"]:
            number += 1
            name = f"P{number:04}__1__{SIZE}___0.png"
            shutil.copy(airfield / split / Path(image["file_name"]).name, folder / split / name)
            image["file_name"] = name
        (folder / f"{split}_coco.json").write_text(json.dumps(content))


def _course(airfield: Path, folder: Path) -> None:
    """The course's layout: a list of annotations of the training images, and test images without any."""
    for split in SPLITS:
        shutil.copytree(airfield / split, folder / split)
    content = _content(airfield, "train")
    names = {image["id"]: Path(image["file_name"]).name for image in content["images"]}
    entries = [{**one, "file_name": names[one["image_id"]], "category_name": "plane"} for one in content["annotations"]]
    (folder / "train.json").write_text(json.dumps(entries))


def _georeferenced(airfield: Path, folder: Path) -> None:
    """TIFFs of four bands with values to 2,047, side by side on the ground, with the day in their names."""
    import rasterio
    from rasterio.transform import from_origin

    east = 500_000
    for split in SPLITS:
        content = _content(airfield, split)
        for image in content["images"]:
            picture = cv2.cvtColor(cv2.imread(str(airfield / split / Path(image["file_name"]).name)), cv2.COLOR_BGR2RGB)
            bands = np.moveaxis(picture.astype(np.uint16) * 8, 2, 0)[[0, 2, 1, 0]]
            name = f"{Path(image['file_name']).stem}_2026010{len(split) - 3}.tif"
            image["file_name"] = name
            folder.mkdir(parents=True, exist_ok=True)
            profile = {"driver": "GTiff", "width": SIZE, "height": SIZE, "count": 4, "dtype": "uint16", "crs": "EPSG:32633"}
            with rasterio.open(folder / name, "w", **profile, transform=from_origin(east, 5_000_000, 0.5, 0.5)) as file:
                file.write(bands)
            east += SIZE // 2
        (folder / f"{split}_coco.json").write_text(json.dumps(content))


def _true_for_once(project: Project) -> None:
    """Make the surest detection of planes-det/1 in each test image a plane: a twin of what finds none is refused."""
    project.score("--model", "planes-det/1", "--data", str(project.data), "--out", "found", "--score-threshold", "0")
    table = pd.read_parquet(project.folder / "found" / "planes-det-1" / "instances.parquet")
    content = _content(project.data, "test")
    images = {Path(image["file_name"]).stem: image["id"] for image in content["images"]}
    for row in table.sort_values("score").drop_duplicates("image_id", keep="last").itertuples():
        x1, y1, x2, y2 = (float(v) for v in (row.x1, row.y1, row.x2, row.y2))
        plane = {"id": len(content["annotations"]) + 1, "image_id": images[row.image_id], "category_id": 1, "iscrowd": 0}
        plane |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
        content["annotations"].append({**plane, "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]]})
    (project.data / "test_coco.json").write_text(json.dumps(content))
    shutil.rmtree(project.folder / "found")


def train_versions(project: Project) -> None:
    """planes-det/1 to /9 (4 to 6 and 7 to 9 are seeds), a U-Net, a composition, a Mask R-CNN; three in production."""
    small = ("--batch-size", "2", "--set", FEW)
    project.step("train_detector", *small, "--steps", "8")
    _true_for_once(project)
    (weights,) = project.folder.glob("mlruns/**/weights.safetensors")
    for steps in ("1", "2"):
        project.step("train_detector", *small, "--weights", str(weights), "--lr", "0.00001", "--steps", steps)
    for steps in ("1", "2"):
        more = ("--lr", "0.00001", "--steps", steps, "--seeds", "3")
        project.step("train_detector", *small, "--weights", str(weights), *more)
    project.step("train_unet", "--batch-size", "4", "--set", CROPS, "--steps", "8")
    project.step("train_maskrcnn", *small, "--steps", "4")
    project.step("compose", "--detector", "planes-det/1", "--segmenter", "planes-unet/1")
    for version in ("planes-det/5", "planes-unet/1", "planes-inst/1"):
        project.registry("promote", version, "--to", "production")
    project.registry("copy", "planes-det/7", "dev.planes-det")
