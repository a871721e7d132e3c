"""The same commands on real images: the course's layout with masks, and tiles with boxes."""

from __future__ import annotations

import json
import re

import pytest

from tests.journeys.conftest import Project

pytestmark = [pytest.mark.xdist_group("real"), pytest.mark.slow]


@pytest.fixture(scope="module")
def real(tmp_path_factory, isaid):
    return Project(tmp_path_factory.mktemp("real"), isaid)


def test_unet_learns_the_real_planes_of_the_course_layout(real, isaid):
    real.step("train_unet", "--data", str(isaid), "--recipe", "unet_scratch", timeout=900)
    version = real.client.get_model_version("planes-unet", "1")
    assert json.loads(version.tags["metrics"])["IoU"] >= 0.84
    real.step("promote", "--model", "planes-unet/1", "--data", str(isaid), "--minimum", "0.84")
    done = real.score("--model", "planes-unet/Production", "--data", str(isaid / "test_coco.json"), "--out", "out")
    assert float(re.search(r"planes-unet/1 +(0\.\d+)", done.stdout)[1]) >= 0.84


def test_a_detector_trains_on_real_tiles_and_scores_a_real_image(real, isaid, dota):
    pattern = r"data.scene_pattern='^P(\d{4})'"
    # Six steps teach nothing: whole images at half scale show as much, in less time.
    settings = f"training.steps=6 training.checkpoint_every=3 tiling=null architecture.zoom=0.5 {pattern}"
    real.step("train_detector", "--data", str(dota), "--recipe", "detector_scratch", "--set", settings, timeout=900)
    real.step("promote", "--data", str(isaid))
    done = real.score("--model", "planes-det/Production", "--data", str(isaid / "test_coco.json"), "--out", "out")
    assert re.search(r"model +AP +AP50", done.stdout)
    assert (real.folder / "out" / "planes-det-1" / "instances.parquet").exists()
