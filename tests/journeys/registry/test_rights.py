"""Who may do what on a server with logins."""

from __future__ import annotations

import pytest

from tests.journeys.conftest import error_line

pytestmark = pytest.mark.xdist_group("registry")


def test_a_viewer_may_score_and_look_but_not_promote(team_with_logins, tmp_path):
    team = team_with_logins
    name = team.model("viewed", "weak", "good")
    team.promote(f"{name}/2")
    viewer = team.server.add_user("viewer-of-planes")
    use = {**viewer, "MLFLOW_EXPERIMENT_NAME": "scorings of viewer-of-planes"}
    arguments = ("--model", f"{name}/production", "--data", team.data, "--out", str(tmp_path / "out"))
    # Where all runs go by default he may not write: nothing is lost, and he is told.
    denied = error_line(team.score(*arguments, code=1, **viewer))
    assert "ermission denied" in denied
    assert "MLFLOW_EXPERIMENT_NAME" in denied
    scored = team.score(*arguments, **use)
    assert f"{name}/2" in scored.stdout
    assert f"{name}/2" in team.registry("list", **viewer).stdout
    assert "production -> 2" in team.registry("history", name, **viewer).stdout
    entries = team.entries(name)
    for command in (("promote", f"{name}/1", "--to", "production", *team.no_gates), ("rollback", name, "--version", "1")):
        assert "ermission denied" in error_line(team.registry(*command, code=1, **use))
    assert team.aliases(name) == {"production": "2"}
    assert team.entries(name) == entries
    wrong = {**viewer, "MLFLOW_TRACKING_PASSWORD": "guessed"}
    assert "cannot be reached" in error_line(team.registry("list", code=1, **wrong))


def test_users_with_the_releaser_role_may_promote(team_with_logins):
    team = team_with_logins
    name = team.model("released", "weak", "good")
    team.promote(f"{name}/1")
    releaser = team.server.add_user("releaser", registered_model="EDIT", experiment="EDIT")
    done = team.promote(f"{name}/2", "staging", **releaser)
    assert f"{name}/2 is staging now" in done.stdout
    assert team.entries(name)[-1]["by"] == "releaser"
    assert team.client.get_model_version(name, "2").current_stage == "Staging"


def test_users_who_may_edit_the_journal_alone_move_no_alias(team_with_logins):
    """Everybody who promotes anything writes to one journal: that right must be worth nothing for other models."""
    team = team_with_logins
    name = team.model("guarded", "weak", "weak", "good")
    team.promote(f"{name}/1")
    team.promote(f"{name}/3")
    other = team.server.add_user("other-team", experiment="EDIT")
    team.server.grant("other-team", "registered_model", "planes-journal", "EDIT")
    known = team.entries(name)
    done = team.registry("rollback", name, "--version", "1", code=1, **other)
    assert "ermission denied" in error_line(done)
    assert f"you need the right to edit {name} and planes-journal" in done.stderr
    # What a promotion writes, without the one thing that needs a right on the model.
    with pytest.MonkeyPatch.context() as patch:
        for key, value in other.items():
            patch.setenv(key, value)
        tags = {"planes_journal_of": name, "alias": "production", "token": "e" * 32, "to": "1", "from": "3"}
        team.client.create_model_version("planes-journal", f"models:/{name}/1", tags={**tags, "after": known[-1]["token"]})
    assert team.entries(name) == known
    assert "finished" not in team.registry("rollback", name, "--version", "3").stdout
    assert team.aliases(name)["production"] == "3"


def test_who_releases_one_model_needs_that_and_the_journal(team_with_logins):
    team = team_with_logins
    # The journal is there, and it is not this user's.
    team.promote(f"{team.model('another-model', 'weak')}/1")
    name = team.model("one-model", "weak")
    own = team.server.add_user("owner-of-one", experiment="EDIT")
    team.server.grant("owner-of-one", "registered_model", name, "EDIT")
    denied = error_line(team.promote(f"{name}/1", code=1, **own))
    assert f"you need the right to edit {name} and planes-journal" in denied
    team.server.grant("owner-of-one", "registered_model", "planes-journal", "EDIT")
    assert f"{name}/1 is production now" in team.promote(f"{name}/1", **own).stdout
    assert [e["state"] for e in team.entries(name)] == ["committed"]


@pytest.mark.parametrize("right", ["EDIT", pytest.param("MANAGE", marks=pytest.mark.soak)])
def test_who_may_move_but_not_delete_aliases_is_not_stopped_by_that(team_with_logins, right):
    team = team_with_logins
    releaser = team.server.add_user(f"releaser-{right}", registered_model=right, experiment="EDIT")
    name = team.model(f"released-{right}", "weak", "weak")
    team.promote(f"{name}/1")
    for alias in ("challenger", "production"):
        assert f"{name}/2 is {alias} now" in team.promote(f"{name}/2", alias, **releaser).stdout
    left = {"challenger": "2"} if right == "EDIT" else {}
    assert team.aliases(name) == {"production": "2", "previous": "1", **left}
    team.registry("rollback", name, **releaser)
    assert team.aliases(name)["production"] == "1"
    assert {e["state"] for e in team.entries(name)} == {"committed"}
