"""A hundred kinds of bad files: each ends in errors.parquet, none ends the job."""

from __future__ import annotations

import os
import shutil
import stat

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from models.tiling.predictor import Tiled
from models.tiling.settings import Tiling
from tests.conftest import write_image
from tests.scoring.bad_files import kinds, write_bad_files, write_unreachable
from tests.scoring.test_job import Brightness, _run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All of them, and three good images in between, with odd names."""
    folder = tmp_path_factory.mktemp("bad")
    write_bad_files(folder)
    write_unreachable(folder)
    (folder / "a folder.png").mkdir()
    for name in ("good.png", "näme with spaces .. and dots.jpg", "日本.png"):
        write_image(folder / name, seed=len(name))
    return folder


@pytest.mark.parametrize("tiled", [False, True])
def test_every_bad_file_is_an_error_and_every_good_one_is_scored(folder, tmp_path, tiled):
    predictor = Tiled(Brightness(), Tiling(size=128)) if tiled else Brightness()
    job = _run(tmp_path, folder, predictor)
    errors = pq.read_table(tmp_path / "m-1" / "errors.parquet").to_pandas()
    scored = pq.read_table(tmp_path / "m-1" / "instances.parquet").to_pandas()
    assert len(kinds()) >= 100
    assert sorted(scored.image_id) == sorted(["good", "näme with spaces .. and dots", "日本"])
    expected = {name for name, _ in kinds()} | {"dangling.png", "loop.png"}
    assert {path.rsplit("/", 1)[1] for path in errors.path} <= expected
    # Links that lead nowhere are not listed as files.
    assert {name for name, _ in kinds()} <= {path.rsplit("/", 1)[1] for path in errors.path}
    assert job.images + job.failures == 3 + len(errors)
    assert set(errors.kind) >= {"not an image", "damaged", "too large"}
    assert all("\n" not in message for message in errors.message)


def test_what_is_unusual_but_readable_is_scored(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 70, 3), dtype=np.uint8)
    image, data = Image.fromarray(pixels), tmp_path / "in"
    data.mkdir()
    image.convert("CMYK").save(data / "cmyk.jpg")
    image.convert("LA").save(data / "la.png")
    image.quantize(20).save(data / "palette.png")
    Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 200).save(data / "sixteen.png")
    Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 200).save(data / "sixteen.tif")
    image.save(data / "animated.webp", save_all=True, append_images=[image.rotate(90)])
    image.save(data / "progressive.jpg", progressive=True)
    image.convert("1").save(data / "bits.tif")
    # The content decides, not the ending.
    image.save(tmp_path / "x.jpg")
    shutil.move(tmp_path / "x.jpg", data / "jpeg.png")
    job = _run(tmp_path, data)
    assert (job.images, job.failures) == (9, 0)


def test_a_file_that_may_not_be_read_or_vanishes_is_an_error(tmp_path):
    data = tmp_path / "in"
    for name in ("a", "b", "c", "d"):
        write_image(data / f"{name}.png", seed=ord(name))

    class Removing(Brightness):
        """Deletes a file that is still to be read."""

        def predict(self, images):
            (data / "d.png").unlink(missing_ok=True)
            return super().predict(images)

    (data / "b.png").chmod(0)
    job = _run(tmp_path, data, Removing())
    errors = pq.read_table(tmp_path / "m-1" / "errors.parquet").to_pandas()
    # For root nothing is forbidden; and a file may be read before it vanishes.
    forbidden = [] if os.access(data / "b.png", os.R_OK) else ["permission denied"]
    assert stat.S_IMODE((data / "b.png").stat().st_mode) == 0
    assert set(errors.kind) <= {"missing", *forbidden}
    assert job.images + job.failures == 4
    assert job.images >= 2
