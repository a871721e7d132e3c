"""Images for the tests in which jobs are killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import SHARED, write_image
from tests.scoring.bad_files import write_bad_files, write_real_and_broken


def _files(folder: Path, count: int) -> Path:
    sources = sorted(p for p in SHARED.glob("*/*/*") if p.suffix in (".png", ".jpg"))[: count // 2]
    if sources:
        write_real_and_broken(folder, sources, count)
    else:
        for i in range(40):
            write_image(folder / f"i {i:02} ü.png", 20 + i, 30, i)
        write_bad_files(folder, 20)
    return folder


@pytest.fixture(scope="session")
def real_and_broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 files, real images and damaged copies of them; where no real ones are at hand, fewer and drawn ones."""
    return _files(tmp_path_factory.mktemp("many"), 200)
