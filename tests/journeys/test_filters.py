"""Each kind of run is found by the search strings that docs/comparing.md shows."""

from __future__ import annotations

import re

import pytest

from tests.pages.blocks import ROOT, read_blocks

pytestmark = pytest.mark.xdist_group("journey")


def _filters():
    (block,) = [b for b in read_blocks(ROOT / "docs" / "comparing.md") if "tags.job_type" in b.text]
    return block.text.splitlines()


@pytest.fixture(scope="module")
def runs(project):
    """A run of each kind that the page looks for; its experiment."""
    data = str(project.data)
    trained = next((project.folder / ".planes" / "training").glob("planes-det-*/model"))
    project.register(trained, "filtered")
    compared = project.run("score", "compare", "planes-det/1", "filtered/1", "--data", data, "--out", "filtered")
    refused = ("promote", "--model", "filtered/1", "--data", data, "--minimum", "2")
    project.step(*refused, code=2)
    experiment = project.client.get_experiment_by_name("planes").experiment_id
    stopped = project.client.create_run(experiment, tags={"job_type": "train"})
    project.client.set_terminated(stopped.info.run_id, "FAILED")
    return experiment, compared.stdout


@pytest.mark.parametrize("shown", _filters())
def test_what_the_page_shows_finds_runs(project, runs, shown):
    # So little training reaches no such AP50.
    found = project.client.search_runs([runs[0]], re.sub(r"> 0\.\d+", ">= 0", shown))
    assert found
    kind = re.search(r"job_type = '(\w+)'", shown)
    assert not kind or {r.data.tags["job_type"] for r in found} == {kind[1]}


def test_every_run_says_its_kind_and_a_comparison_leads_to_its_own_page(project, runs):
    experiment, said = runs
    every = project.client.search_runs([experiment])
    kinds = {(r.data.tags.get("task"), r.data.tags["job_type"]) for r in every if "task" in r.data.tags}
    assert {("unet", "train"), ("detector", "train"), ("score", "score"), ("promote", "promote")} <= kinds
    (made,) = [r.info.run_id for r in every if r.data.tags["job_type"] == "compare"][:1]
    assert f"/#/experiments/{experiment}/runs/{made}?workflowType=machine_learning" in said
    # Two trainings with one recipe are told apart by what was changed.
    version = project.client.get_model_version("planes-unet", "1")
    name = project.client.get_run(version.run_id).info.run_name
    assert name.startswith("planes-unet demo_unet ")
    assert "training.batch_size=4" in name
