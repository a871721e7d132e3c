"""The journal: who was first, what an interruption leaves behind at each single step, and the way back."""

from __future__ import annotations

import os
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from models.engines.unet.predictor import SegmenterArchitecture, build_segmenter, segmenter_spec
from models.errors import RegistryError
from models.saved.folder import save_model
from pipelines.registry import journal, model_versions, promotion
from pipelines.registry.registration import log_and_register
from pipelines.tracking import mlflow_runs

NAME = "planes-x"
WRITES = (
    "create_registered_model", "create_model_version", "set_model_version_tag", "set_registered_model_alias",
    "set_registered_model_tag",
    "delete_registered_model_alias", "transition_model_version_stage",
)  # fmt: skip


@pytest.fixture
def client(tmp_path, monkeypatch):
    """A real SQLite store with versions 1, 2, 3 of one saved folder."""
    monkeypatch.chdir(tmp_path)
    # MLflow leaves it behind when it chooses an experiment, here that of the test before.
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "")
    mlflow_runs.connect()
    architecture = SegmenterArchitecture(network="skipnet", crop_size=64)
    saved = save_model("m", segmenter_spec(architecture, ["plane"]), build_segmenter(architecture).state_dict())
    with mlflow_runs.tracked_run("run", {}) as run:
        first, _ = log_and_register(saved, NAME, np.zeros((64, 64, 3), np.uint8), {}, run.info.run_id)
    client = MlflowClient()
    for _ in range(2):
        client.create_model_version(NAME, first.source, run_id=run.info.run_id, tags=first.tags)
    yield client
    mlflow.set_tracking_uri(None)


def _move(to, kind="promote", at=None, why="better"):
    at = at or promotion.read_alias_state(NAME, "production")
    return promotion.move(at, to, kind, why)


def _aliases():
    return model_versions.aliases_of(NAME)


def test_promotions_pile_up_and_rollbacks_take_them_off(client):
    for version in "123":
        _move(version)
    assert _aliases() == {"production": "3", "previous": "2"}
    tags = client.get_model_version(NAME, "3").tags
    assert (tags["promoted_to_production"], tags["promoted_to_production_from"]) == ("better", "2")
    assert tags["promoted_to_production_by"] == journal.whoami()
    for back, below in (("2", "1"), ("1", None)):
        at = promotion.read_alias_state(NAME, "production")
        assert promotion.rollback_target(at) == back
        _move(back, "rollback", at)
        assert _aliases().get("previous") == below
    with pytest.raises(RegistryError, match="no version is known that was production before; give --version"):
        promotion.rollback_target(promotion.read_alias_state(NAME, "production"))
    assert [e.state for e in journal.read_journal(NAME)] == ["committed"] * 5


def test_the_second_of_two_that_decided_at_once_is_told_who_won(client):
    _move("1")
    first, second = promotion.read_alias_state(NAME, "production"), promotion.read_alias_state(NAME, "production")
    _move("2", at=first)
    with pytest.raises(RegistryError, match=r"was moved to version 2 by .* meanwhile \(better\).*decide again"):
        _move("3", at=second)
    assert _aliases() == {"production": "2", "previous": "1"}
    assert [e.state for e in journal.read_journal(NAME)] == ["committed", "committed", "superseded"]
    # Aliases do not disturb each other.
    promotion.move(promotion.read_alias_state(NAME, "challenger"), "3", "promote", "new")
    assert _aliases()["challenger"] == "3"


def test_a_challenger_that_wins_is_no_challenger_any_more(client):
    _move("1")
    promotion.move(promotion.read_alias_state(NAME, "challenger"), "3", "promote", "new")
    _move("3")
    assert _aliases() == {"production": "3", "previous": "1"}


def test_moves_past_the_journal_are_seen_and_not_undone(client):
    _move("1")
    at = promotion.read_alias_state(NAME, "production")
    client.set_registered_model_alias(NAME, "production", "3")
    with pytest.raises(RegistryError, match="moved to version 3 past planes-registry meanwhile"):
        _move("2", at=at)
    assert _aliases()["production"] == "3"
    _move("2")
    assert _aliases() == {"production": "2", "previous": "3"}
    assert [e.state for e in journal.read_journal(NAME)] == ["committed", "aborted", "committed"]


def test_other_spellings_of_an_alias_are_never_at_odds(client):
    client.set_registered_model_alias(NAME, "Production", "1")
    seen = []
    real = MlflowClient.set_registered_model_alias

    def spying(self, *arguments):
        real(self, *arguments)
        seen.append(model_versions.find_alias(NAME, "production"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", spying)
        _move("2")
    assert seen[0] == "2"
    assert _aliases() == {"production": "2", "previous": "1"}


def _killed_at(step, to):
    """Move in a process that ends, without any clean-up, in place of its write number ``step``; True if it got that far."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    try:
        done = 0

        def ending(real):
            def write(*arguments, **options):
                nonlocal done
                done += 1
                if done == step:
                    os._exit(9)
                return real(*arguments, **options)

            return write

        for name in WRITES:
            setattr(MlflowClient, name, ending(getattr(MlflowClient, name)))
        _move(to)
    finally:
        os._exit(0)


def test_a_kill_in_place_of_each_write_leaves_the_old_or_the_new_version(client):
    """Every write of a promotion is left out once, with all that follows it; the next one puts things right."""
    _move("1")
    states, steps = set(), 0
    for step in range(1, 60):
        old, new = ("1", "2") if step % 2 else ("2", "1")
        if not _killed_at(step, new):
            break
        steps += 1
        assert _aliases()["production"] in (old, new)
        last = journal.effective_entries(journal.read_journal(NAME), "production")[-1]
        states.add((last.state, _aliases()["production"] == last.move.to))
        # Whoever comes next finishes what counts, and goes on to where the round was meant to end.
        at = promotion.read_alias_state(NAME, "production")
        if at.version != new:
            _move(new, at=at)
        assert _aliases() == {"production": new, "previous": old}
        assert all(e.state in ("committed", "superseded") for e in journal.read_journal(NAME))
    assert steps >= 8
    # Before the entry, between entry and alias, and after the alias.
    assert states == {("committed", True), ("pending", False), ("pending", True)}


def test_one_journal_for_all_models_keeps_their_moves_apart(client):
    _move("1")
    first = client.get_model_version(NAME, "1")
    for name in ("planes-y", f"{NAME}-2"):
        client.create_registered_model(name)
        client.create_model_version(name, first.source, tags=first.tags)
        promotion.move(promotion.read_alias_state(name, "production"), "1", "promote", f"of {name}")
    _move("2")
    assert [m.name for m in client.search_registered_models() if m.name not in model_versions.registered_names()] == [
        "planes-journal"
    ]
    assert [(e.number, e.move.to) for e in journal.read_journal(NAME)] == [(1, "1"), (4, "2")]
    assert [e.move.why for e in journal.read_journal("planes-y")] == ["of planes-y"]
    with pytest.raises(RegistryError, match="is the journal of planes-y, not a model"):
        model_versions.resolve("planes-journal/2")


def test_an_entry_that_the_model_does_not_know_of_does_not_count(client):
    """Who may write to the journal, but not to the model, can neither move its alias nor rewrite its history."""
    _move("1")
    last = journal.read_journal(NAME)[-1]
    real = client.get_model_version("planes-journal", str(last.number))
    forged = {**real.tags, "after": last.id, "to": "3", "from": "1", "token": "f" * 32, "state": "pending"}
    client.create_model_version("planes-journal", real.source, tags=forged)
    assert [e.id for e in journal.read_journal(NAME)] == [last.id]
    client.set_model_version_tag("planes-journal", str(last.number), "state", "pending")
    assert promotion.complete_pending(NAME, "production") is None
    _move("2")
    assert _aliases() == {"production": "2", "previous": "1"}
    client.set_model_version_tag("planes-journal", str(last.number), "to", "3")
    assert [e.move.to for e in journal.read_journal(NAME)] == ["2"]
    _move("3")
    assert _aliases()["production"] == "3"


def test_an_answer_that_got_lost_is_found_by_its_token(client, monkeypatch):
    real = MlflowClient.create_model_version
    lost = []

    def answers_get_lost(self, name, *arguments, **options):
        made = real(self, name, *arguments, **options)
        if name == journal.JOURNAL and not lost:
            lost.append(made.version)
            raise mlflow.MlflowException("connection reset by peer")
        return made

    monkeypatch.setattr(MlflowClient, "create_model_version", answers_get_lost)
    _move("1")
    assert [str(e.number) for e in journal.read_journal(NAME)] == [str(v) for v in lost]
    assert journal.read_journal(NAME)[0].state == "committed"
    assert _aliases() == {"production": "1"}


def _interrupted(to):
    """A move that is in the journal but was not carried out."""
    at = promotion.read_alias_state(NAME, "production")
    return journal.append(NAME, journal.Move("production", "promote", to, at.version, at.after, "better"))


def test_who_was_held_up_does_not_undo_a_later_move(client, monkeypatch):
    """Between the look at the alias and its move another process finished this move and made the next one."""
    _move("1")
    entry = _interrupted("2")
    real = model_versions.set_alias

    def held_up(name, alias, version):
        monkeypatch.setattr(model_versions, "set_alias", real)
        promotion.finish(NAME, entry)
        _move("3")
        real(name, alias, version)

    monkeypatch.setattr(model_versions, "set_alias", held_up)
    promotion.finish(NAME, entry)
    assert _aliases() == {"production": "3", "previous": "2"}


def test_an_abandoned_entry_is_not_where_the_alias_belongs(client, monkeypatch):
    """As above, but the later move was abandoned: the alias stays with the newest move that was not."""
    _move("1")
    entry = _interrupted("2")
    real = model_versions.set_alias

    def held_up(name, alias, version):
        monkeypatch.setattr(model_versions, "set_alias", real)
        promotion.finish(NAME, entry)
        later = _interrupted("3")
        journal.mark(NAME, later, "aborted")
        real(name, alias, version)

    monkeypatch.setattr(model_versions, "set_alias", held_up)
    assert promotion.finish(NAME, entry).move.to == "2"
    assert _aliases()["production"] == "2"
    assert [e.state for e in journal.read_journal(NAME)] == ["committed", "committed", "aborted"]


def test_a_move_that_was_abandoned_meanwhile_is_told(client, monkeypatch):
    _move("1")
    entry = _interrupted("2")
    real = model_versions.set_alias

    def held_up(name, alias, version):
        monkeypatch.setattr(model_versions, "set_alias", real)
        journal.mark(NAME, entry, "aborted")
        real(name, alias, version)

    monkeypatch.setattr(model_versions, "set_alias", held_up)
    with pytest.raises(RegistryError, match="decide again"):
        promotion.finish(NAME, entry)
    assert _aliases()["production"] == "1"


def test_a_rollback_after_a_move_past_the_journal_goes_one_back(client):
    _move("1")
    _move("2")
    client.set_registered_model_alias(NAME, "production", "3")
    at = promotion.read_alias_state(NAME, "production")
    assert promotion.rollback_target(at) == "2"


def test_what_an_earlier_release_adds_after_the_switch_does_not_count(client):
    """0.6.0 does not see this journal: what it writes into its own one changes no history."""
    legacy = f"{NAME}-journal"
    client.create_registered_model(legacy, tags={"planes_journal_of": NAME})
    source = client.get_model_version(NAME, "1").source

    def of_060(to, origin, after):
        tags = {"planes_journal_of": NAME, "alias": "production", "kind": "promote", "to": to, "from": origin}
        client.create_model_version(legacy, source, tags={**tags, "after": after, "state": "done", "by": "x", "at": "y"})

    of_060("1", "-", "0")
    client.set_registered_model_alias(NAME, "production", "1")
    assert [e.move.to for e in journal.read_journal(NAME)] == ["1"]
    _move("2")
    of_060("3", "1", "1")
    assert [(e.move.to, e.state) for e in journal.read_journal(NAME)] == [("1", "committed"), ("2", "committed")]
    _move("3")
    assert _aliases() == {"production": "3", "previous": "2"}


def test_an_overtaken_move_does_not_come_back_when_others_are_deleted(client):
    _move("1")
    first, second = promotion.read_alias_state(NAME, "production"), promotion.read_alias_state(NAME, "production")
    _move("2", at=first)
    with pytest.raises(RegistryError, match="decide again"):
        _move("3", at=second)
    _move("1", "rollback")
    faster = next(e for e in journal.read_journal(NAME) if e.move.to == "2")
    client.delete_model_version("planes-journal", str(faster.number))
    promotion.read_alias_state(NAME, "production")
    assert _aliases()["production"] == "1"


def test_a_move_that_is_told_to_have_failed_does_not_happen_later(client, monkeypatch):
    _move("1")
    real = MlflowClient.create_model_version

    def answers_get_lost(self, name, *arguments, **options):
        made = real(self, name, *arguments, **options)
        if name == journal.JOURNAL:
            raise mlflow.MlflowException("connection reset by peer")
        return made

    def search_fails(self, *_, **__):
        raise mlflow.MlflowException("connection refused")

    at = promotion.read_alias_state(NAME, "production")
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_model_version", answers_get_lost)
        patch.setattr(MlflowClient, "search_model_versions", search_fails)
        with pytest.raises(RegistryError, match="cannot be written"):
            _move("2", at=at)
    promotion.read_alias_state(NAME, "production")
    assert _aliases()["production"] == "1"
    _move("3")
    assert _aliases() == {"production": "3", "previous": "1"}


def test_no_model_is_registered_under_the_name_of_the_journal(client):
    with pytest.raises(RegistryError, match="is the journal of promotions; give the model another name"):
        log_and_register(Path("m"), "planes-journal", np.zeros((64, 64, 3), np.uint8), {}, "r")


def test_a_viewer_is_told_before_anything_is_written(client, monkeypatch):
    def denied(self, *arguments, **options):
        raise mlflow.MlflowException("Permission denied")

    monkeypatch.setattr(MlflowClient, "set_registered_model_tag", denied)
    with pytest.raises(RegistryError, match=f"you need the right to edit {NAME} and planes-journal"):
        _move("1")
    assert not client.search_registered_models("name = 'planes-journal'")


@pytest.mark.parametrize(("word", "state"), [("begun", "pending"), ("done", "committed"), ("abandoned", "aborted")])
def test_states_are_read_by_the_words_that_they_once_had(client, word, state):
    _move("1")
    ((key, value),) = [(k, v) for k, v in client.get_registered_model(NAME).tags.items() if k.startswith(journal.MOVE_TAG)]
    assert value.startswith("committed ")
    client.set_registered_model_tag(NAME, key, f"{word} {value.partition(' ')[2]}")
    assert [e.state for e in journal.read_journal(NAME)] == [state]
    promotion.read_alias_state(NAME, "production")
    assert client.get_registered_model(NAME).tags[key].startswith("committed ") == (word == "begun")


def test_a_move_that_the_earlier_release_left_is_marked_in_its_words(client):
    legacy = f"{NAME}-journal"
    client.create_registered_model(legacy, tags={"planes_journal_of": NAME})
    tags = {"planes_journal_of": NAME, "alias": "production", "kind": "promote", "to": "1", "from": "-", "after": "0"}
    source = client.get_model_version(NAME, "1").source
    client.create_model_version(legacy, source, tags={**tags, "state": "begun", "by": "x", "at": "y"})
    promotion.read_alias_state(NAME, "production")
    assert _aliases()["production"] == "1"
    assert client.get_model_version(legacy, "1").tags["state"] == "done"
    assert [e.state for e in journal.read_journal(NAME)] == ["committed"]


def test_every_page_of_versions_is_read(client, monkeypatch):
    for to in ("1", "2", "3"):
        _move(to)
    monkeypatch.setattr(model_versions, "PAGE", 1)
    assert [int(v.version) for v in model_versions.versions_of(NAME)] == [3, 2, 1]
    assert [e.move.to for e in journal.read_journal(NAME)] == ["1", "2", "3"]
