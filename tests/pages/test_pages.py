"""Every command and example of a page is run, in the order of the page and in a folder with a store of its own.

What is called otherwise than it stands there is in `substitutions.py`; what is not run is marked on the page,
with the reason.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

from tests.journeys.stack import MlflowServer
from tests.pages.blocks import PAGES, read_blocks
from tests.pages.running import PageRun
from tests.stores import s3_server

pytestmark = pytest.mark.docs

# What the reader of a page has before its first command; of the others: trained versions.
BEGINS_WITH = {"README.md": "demo", "first-hour.md": "demo", "index.md": "demo"}
# Its example is run by the suite, with what it must print.
ELSEWHERE = {"python.md": "tests/journeys/test_python.py"}


def _pages():
    for page in PAGES:
        if page.name in ELSEWHERE:
            continue
        blocks = read_blocks(page)
        if any(block.language in ("", "python", "yaml") and not block.why_not() for block in blocks):
            yield pytest.param(page, marks=pytest.mark.xdist_group(f"page {page.name}"), id=page.name)


@pytest.fixture(scope="module")
def bucket(documented_data):
    """The environment of commands for which `s3://bucket` is a bucket of a server on loopback."""
    if find_spec("moto") is None or find_spec("s3fs") is None:
        yield {}
        return
    with s3_server("bucket") as store:
        for folder in ("survey", "scenes"):
            for image in (documented_data / "survey").iterdir():
                store.put(str(image), f"bucket/{folder}/{image.name}")
        yield {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


@pytest.fixture
def server(tmp_path):
    """A tracking server with logins, started when it is asked for, and how its admin logs in."""
    (tmp_path / "server").mkdir()
    running = MlflowServer(tmp_path / "server", dict(os.environ), auth=True)
    running.start()
    yield running
    running.stop()


# Before a page's first command: what its text takes as done.
BEFORE = {
    "docs/scoring.md": (
        ("--model", "planes-inst/1", "--data", "data/airfield", "--out", "predictions"),
        ("--model", "planes-det/3", "--data", "harbour/*.tif", "--out", "predictions"),
    ),
    "docs/comparing.md": (
        ("--model", "planes-det/1", "--data", "data/airfield", "--out", "before"),
        ("--model", "planes-det/2", "--data", "data/airfield", "--out", "before"),
    ),
}


@pytest.mark.parametrize("page", _pages())
def test_what_the_page_shows_works(page, working_folder, request):
    blocks = read_blocks(page)
    shown = "".join(block.text for block in blocks if not block.why_not())
    project = working_folder(BEGINS_WITH.get(page.name, "versions"))
    env = dict(request.getfixturevalue("bucket")) if "s3://" in shown else {}
    address = ""
    if "https://mlflow." in shown:
        running = request.getfixturevalue("server")
        address, env = running.uri, env | running.admin
    for arguments in BEFORE.get(f"docs/{page.name}", ()):
        project.score(*arguments)
    run = PageRun(project, env, address)
    for block in blocks:
        run.run(block)
    for seconds, what in sorted(run.seconds, reverse=True)[:12]:
        print(f"{seconds:6.1f} s  {what}")
    assert not run.faults, "\n\n".join(run.faults)
    assert run.seconds, f"{page.name}: nothing was run"
    if run.lacking:
        pytest.skip("all else was run: " + "; ".join(run.lacking))


@pytest.mark.parametrize(("page", "test"), ELSEWHERE.items())
def test_what_is_run_elsewhere_is_run_there(root, page, test):
    assert f'"docs" / "{page}"' in (root / test).read_text()
    assert {block.language for block in read_blocks(root / "docs" / page)} == {"python"}


def test_a_command_that_fails_would_be_noticed(working_folder, tmp_path, root):
    text = "```\nplanes-registry show planes-det/1\n```\n\n```python\nassert 1 + 1 == 3\n```\n"
    run = PageRun(working_folder("data"), {}, "")
    for block in read_blocks(root / "README.md", text):
        run.run(block)
    assert len(run.faults) == 2
    assert "README.md:1: planes-registry show planes-det/1" in run.faults[0]
    assert "AssertionError" in run.faults[1]
