"""Rollbacks, the history, and what the commands show of versions."""

from __future__ import annotations

import json
import re
import subprocess

import pytest

from tests.journeys.conftest import error_line
from tests.journeys.registry.conftest import history

pytestmark = pytest.mark.xdist_group("registry")


@pytest.fixture(scope="module")
def seen(_team):
    """`history-seen`: 1 is production, 3 was it between; promoted, rolled back and back again; 3 scored once."""
    team = _team
    with pytest.MonkeyPatch.context() as patch:
        for key, value in (team.server.admin if team.server else {}).items():
            patch.setenv(key, value)
        name = team.model("history-seen", "weak", "weak", "good")
    team.promote(f"{name}/1")
    team.promote(f"{name}/3", "challenger")
    team.promote(f"{name}/3")
    team.score("--model", f"{name}/production", "--data", team.data, "--out", "seen")
    back = team.registry("rollback", name, "--reason", "blurred at night")
    assert f"{name}/1 is production again, instead of version 3: blurred at night" in back.stdout
    return name


def test_a_rollback_forgets_what_it_took_off(team):
    name = team.model("history-back", "weak", "good")
    for version in "12":
        team.promote(f"{name}/{version}")
    assert team.aliases(name) == {"production": "2", "previous": "1"}
    team.registry("rollback", name, "--reason", "blurred at night")
    assert team.aliases(name) == {"production": "1"}
    assert "no version is known that was production before" in error_line(team.registry("rollback", name, code=1))
    team.registry("rollback", name, "--version", "2", "--reason", "it was the camera")
    assert team.aliases(name)["production"] == "2"
    assert history(team, name) == [
        ("production", None, "1", "promote", "committed"),
        ("production", "1", "2", "promote", "committed"),
        ("production", "2", "1", "rollback", "committed"),
        ("production", "1", "2", "rollback", "committed"),
    ]


def test_the_history_tells_every_move(team, seen):
    moves = [("production", None, "1"), ("challenger", None, "3"), ("production", "1", "3"), ("production", "3", "1")]
    assert [m[:3] for m in history(team, seen)] == moves
    text = team.registry("history", seen).stdout
    for part in ("blurred at night", "challenger: version 3 went on to production", "now: production -> 1"):
        assert part in text


def test_lists_show_and_diff(team, seen):
    listed = team.registry("list").stdout
    assert re.search(rf"{seen}/1 +.*production", listed)
    assert "journal" not in listed
    shown = re.sub(" +", " ", team.registry("show", seen, "3").stdout)
    for part in (
        "trained on",
        "airfield/train (digest 0000",
        "by trainer",
        "commit 0000",
        "scoring runs",
        "blurred at night",
    ):
        assert part in shown, part
    differing = team.registry("diff", f"{seen}/1", f"{seen}/3").stdout
    assert "weights_sha256" not in differing
    assert re.search(r"files +digest", differing)
    assert "the same params, metrics, data, code and files" in team.registry("diff", f"{seen}/1", f"{seen}/2").stdout


def test_two_versions_differ_in_data_and_code(team, root):
    commits = subprocess.run(["git", "log", "--format=%H", "-2"], cwd=root, capture_output=True, text=True).stdout.split()
    for commit, digest in zip((commits * 2)[:2] or ["0" * 40, "1" * 40], ("a" * 16, "b" * 16), strict=True):
        team.register(team.weak, "twins", git_commit=commit, data_digest=digest)
    told = json.loads(team.registry("diff", "twins/1", "twins/2", "--json").stdout)
    rows = {(r["section"], r["key"]): (r["twins/1"], r["twins/2"]) for r in told["rows"]}
    assert rows["data", "data_digest"] == ("a" * 16, "b" * 16)
    if len(commits) == 2:
        assert rows["code", "git_commit"] == tuple(commits)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("show", "{name}/9"), "no version, alias or stage '9'"),
        (("history", "nobody"), "no registered model 'nobody'; registered: "),
        (("rollback", "seed-god"), "no registered model 'seed-god'; did you mean seed-good? registered: "),
        (("promote", "{name}/3", "--to", "latest"), "alias 'latest': has a meaning of its own"),
        (("show", "planes-journal/1"), "is the journal of"),
        (("rollback", "{name}", "--version", "77"), "no version, alias or stage '77'"),
    ],
)
def test_mistakes_are_one_line(team, seen, command, message):
    assert message in error_line(team.registry(*(word.format(name=seen) for word in command), code=1))
