"""The same commands on real images: the course's layout with masks, and tiles with boxes.

A few steps here; the U-Net's whole training, with what it must reach, in `make soak`.
"""

from __future__ import annotations

import json
import re

import pytest

from tests.journeys.conftest import Project

pytestmark = [pytest.mark.xdist_group("real"), pytest.mark.slow]


@pytest.mark.parametrize(("steps", "least"), [(2, -1.0), pytest.param(None, 0.84, marks=pytest.mark.soak)])
def test_unet_learns_the_real_planes_of_the_course_layout(tmp_path, isaid, steps, least):
    real = Project(tmp_path, isaid)
    more = () if steps is None else ("--steps", str(steps))
    real.step("train_unet", "--data", str(isaid), "--recipe", "unet_scratch", *more)
    metrics = json.loads(real.client.get_model_version("planes-unet", "1").tags["metrics"])
    assert metrics["IoU"] >= least
    real.step("promote", "--model", "planes-unet/1", "--data", str(isaid), "--minimum", str(least))
    done = real.score("--model", "planes-unet/Production", "--data", str(isaid / "test_coco.json"), "--out", "out")
    # The same planes of the same images, read through the other layout.
    assert float(re.search(r"planes-unet/1 +(\d\.\d+)", done.stdout)[1]) == pytest.approx(metrics["IoU"], abs=0.01)


def test_a_detector_trains_on_real_tiles_and_scores_a_real_image(tmp_path, isaid, dota):
    real = Project(tmp_path, isaid)
    pattern = r"data.scene_pattern='^P(\d{4})'"
    # Six steps teach nothing: whole images at half scale show as much, in less time.
    settings = f"training.steps=6 training.checkpoint_every=3 tiling=null architecture.zoom=0.5 {pattern}"
    settings += " synthetic.scenes=4"
    real.step("train_detector", "--data", str(dota), "--recipe", "detector_scratch", "--set", settings)
    real.step("promote", "--data", str(isaid))
    done = real.score("--model", "planes-det/Production", "--data", str(isaid / "test_coco.json"), "--out", "out")
    assert re.search(r"model +AP +AP50", done.stdout)
    assert (real.folder / "out" / "planes-det-1" / "instances.parquet").exists()
