"""Moving an alias: the journal decides who may, then alias, `previous`, stage and tags follow; and the way back."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import mlflow

from models.errors import RegistryError, one_line
from pipelines.registry import journal
from pipelines.registry.journal import Entry, Kind, Move
from pipelines.registry.model_versions import Registry
from pipelines.tracking.mlflow_runs import denied, store_errors

PRODUCTION, PREVIOUS, CHALLENGER = "production", "previous", "challenger"

TRIES = 20

# MLflow's old stages that aliases of that name are mirrored to, where the server still has stages.
STAGES = {"production": "Production", "staging": "Staging"}


@dataclass(frozen=True)
class AliasState:
    """Where an alias points before a decision, and the journal entry that the decision will follow.

    ``finished`` is an interrupted move that was completed on the way here.
    """

    name: str
    alias: str
    version: str | None
    after: str
    finished: Entry | None = None


def read_alias_state(registry: Registry, name: str, alias: str, look_only: bool = False) -> AliasState:
    """Read where an alias stands; an interrupted move is completed first, unless ``look_only``.

    Raises:
        RegistryError: the store refuses.
    """
    alias = checked_alias(alias)
    finished = None
    for _ in range(TRIES):
        finished = finished if look_only else complete_pending(registry, name, alias) or finished
        last = _last(registry, name, alias)
        version = registry.find_alias(name, alias)
        # Alias and journal are read one after the other; nobody may have written in between.
        if _last(registry, name, alias) == last and (look_only or last is None or last.state != "pending"):
            return AliasState(name, alias, version, last.id if last else journal.FIRST, finished)
    raise RegistryError(f"{name}: {alias} is being moved all the time; try again")


def _last(registry: Registry, name: str, alias: str) -> Entry | None:
    """The last entry of an alias that counts."""
    return next(reversed(journal.effective_entries(journal.read_journal(registry, name), alias)), None)


def checked_alias(alias: str) -> str:
    """The alias in lower case.

    Raises:
        RegistryError: a name that MLflow or this project needs for something else.
    """
    written = alias.lower()
    if written in ("latest", "none", PREVIOUS) or written.removeprefix("v").isdigit() or not written:
        raise RegistryError(f"alias {alias!r}: has a meaning of its own; take another, such as production or challenger")
    return written


def move(registry: Registry, at: AliasState, to: str, kind: Kind, why: str, *, run: str = "") -> Entry:
    """Move the alias, if it still stands where the decision found it.

    Raises:
        RegistryError: another process was faster (saying which and why), or the store refuses.
    """
    entry = journal.append(registry, at.name, Move(at.alias, kind, to, at.version, at.after, why, run))
    if entry.state == "superseded":
        # For good, whatever becomes of the entries that were faster.
        journal.mark(registry, at.name, entry, "superseded")
        entries = journal.effective_entries(journal.read_journal(registry, at.name), at.alias)
        # Of several moves since, the one that took this one's place.
        first = next((e for e in entries if e.move.after == at.after), entries[-1] if entries else entry)
        raise RegistryError(
            f"{at.name}: {at.alias} was moved to version {first.move.to} by {first.by} at {first.at} meanwhile "
            f"({first.move.why}); {at.name}/{to} was not promoted: decide again"
        )
    return finish(registry, at.name, entry)


def finish(registry: Registry, name: str, entry: Entry) -> Entry:
    """Do what an entry says; may be done again, and by several processes at once.

    Raises:
        RegistryError: the alias was moved past the journal, or the store refuses.
    """
    alias, to = entry.move.alias, entry.move.to
    current = registry.find_alias(name, alias)
    if current not in (to, entry.move.origin):
        latest = next((e for e in journal.read_journal(registry, name) if e.id == entry.id), entry)
        if latest.state == "committed":
            return latest
        journal.mark(registry, name, entry, "aborted")
        raise RegistryError(
            f"{name}: {alias} was moved to version {current or 'none'} past planes-registry meanwhile; "
            f"version {to} was not promoted: decide again"
        )
    if not _exists(registry, name, to):
        journal.mark(registry, name, entry, "aborted")
        raise RegistryError(f"{name}: version {to} was deleted before {alias} could be moved to it")
    if current != to:
        registry.set_alias(name, alias, to)
    # Whoever was held up between the look and the move may have undone a later one.
    entries = journal.effective_entries(journal.read_journal(registry, name), alias)
    place = next((i for i, e in enumerate(entries) if e.id == entry.id), len(entries))
    later = [e for e in entries[place + 1 :] if e.state != "aborted"]
    if later:
        registry.set_alias(name, alias, later[-1].move.to)
        return finish(registry, name, later[-1])
    if place == len(entries) or entries[place].state == "aborted":
        _undo(registry, name, entry, [e for e in entries[:place] if e.state != "aborted"])
        raise RegistryError(f"{name}: {alias} was moved past planes-registry meanwhile, and so was this move: decide again")
    _follow(registry, name, entry)
    journal.mark(registry, name, entry, "committed")
    return entry


def _undo(registry: Registry, name: str, entry: Entry, earlier: Sequence[Entry]) -> None:
    """Put an alias back that was moved for an entry which had been abandoned meanwhile."""
    back = earlier[-1].move.to if earlier else entry.move.origin
    if back is not None:
        registry.set_alias(name, entry.move.alias, back)
    else:
        _drop_alias(registry, name, entry.move.alias)


def complete_pending(registry: Registry, name: str, alias: str) -> Entry | None:
    """Complete an alias's last move if it was interrupted; return it if there was one.

    Raises:
        RegistryError: the store refuses.
    """
    last = _last(registry, name, alias)
    if last is None or last.state != "pending":
        return None
    try:
        return finish(registry, name, last)
    except RegistryError:
        # Abandoned: the alias stands where somebody else put it. Anything else is an error still.
        again = _last(registry, name, alias)
        if again is not None and again.state == "pending":
            raise
        return None


def _exists(registry: Registry, name: str, version: str) -> bool:
    try:
        return registry.client.get_model_version(name, version) is not None
    except mlflow.MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise RegistryError(f"{name}/{version}: cannot be read ({one_line(error, 200)})") from error


def _follow(registry: Registry, name: str, entry: Entry) -> None:
    """What goes with an alias: `previous`, the stage, tags of who, when, why and from which; a challenger that won."""
    client, what = registry.client, entry.move
    tags = {"": what.why, "_by": entry.by, "_at": entry.at, "_from": what.origin or "none", "_run": what.run or "none"}
    with store_errors(f"{name}: {what.alias} was moved, but not all that goes with it"):
        for ending, value in tags.items():
            client.set_model_version_tag(name, what.to, f"promoted_to_{what.alias}{ending}", value[:4000])
        if what.alias == PRODUCTION:
            earlier = previous_version(journal.read_journal(registry, name), what.alias)
            if earlier is not None and _exists(registry, name, earlier):
                registry.set_alias(name, PREVIOUS, earlier)
            elif registry.find_alias(name, PREVIOUS) is not None:
                _drop_alias(registry, name, PREVIOUS)
            if registry.find_alias(name, CHALLENGER) == what.to:
                _drop_alias(registry, name, CHALLENGER)
    mirror_stage(registry, name, what.alias, what.to)


def _drop_alias(registry: Registry, name: str, alias: str) -> None:
    """Remove an alias that tells nothing any more; it stays where this user may move aliases but not delete them.

    MLflow's logins ask for MANAGE to delete. A move, above all a rollback, must not fail for that.
    """
    try:
        registry.client.delete_registered_model_alias(name, alias)
    except mlflow.MlflowException as error:
        if not denied(error):
            raise


def mirror_stage(registry: Registry, name: str, alias: str, version: str) -> bool:
    """Put a version into MLflow's old stage of that name, the others there to Archived; False without stages."""
    stage = STAGES.get(alias)
    if stage is None:
        return False
    client = registry.client
    try:
        # Without MLflow's notice of deprecation: `warnings.catch_warnings` holds for one thread at a time only.
        transition = inspect.unwrap(type(client).transition_model_version_stage)
        transition(client, name, version, stage)
        # MLflow's own archive_existing_versions fails on PostgreSQL (3.17: it compares numbers with texts).
        for other in registry.versions_of(name):
            if other.current_stage == stage and str(other.version) != version:
                transition(client, name, str(other.version), "Archived")
    except (mlflow.MlflowException, AttributeError):
        # Deprecated since MLflow 2.9; servers such as Unity Catalog have none.
        return False
    return True


def previous_version(entries: Sequence[Entry], alias: str, stands: str | None = None) -> str | None:
    """The version that a rollback goes to: promotions pile up, a rollback takes the last one off.

    ``stands`` is where the alias stands, if that is known: it may have been moved past the journal.

    >>> def entry(n, kind, to, origin, state="committed"):
    ...     return Entry(n, Move("production", kind, to, origin, str(n - 1), ""), "a", "t", state)
    >>> moves = [entry(1, "promote", "2", None), entry(2, "promote", "5", "2"), entry(3, "promote", "7", "5")]
    >>> previous_version(moves, "production"), previous_version([*moves, entry(4, "rollback", "5", "7")], "production")
    ('5', '2')
    >>> previous_version(moves, "production", "9")
    '7'
    """
    pile: list[str] = []
    for entry in journal.effective_entries(entries, alias):
        if entry.state == "aborted":
            continue
        # Where it was moved past the journal, what stood there is known by the next entry alone.
        if entry.move.origin is not None and (not pile or pile[-1] != entry.move.origin):
            pile.append(entry.move.origin)
        if entry.move.kind == "rollback" and entry.move.to in pile:
            del pile[len(pile) - pile[::-1].index(entry.move.to) :]
        elif not pile or pile[-1] != entry.move.to:
            pile.append(entry.move.to)
    if stands is not None and pile and pile[-1] != stands:
        pile.append(stands)
    return pile[-2] if len(pile) > 1 else None


def rollback_target(registry: Registry, at: AliasState) -> str:
    """The version to go back to.

    Raises:
        RegistryError: nothing stood there before.
    """
    target = previous_version(journal.read_journal(registry, at.name), at.alias, at.version)
    if target is None and at.alias == PRODUCTION:
        # Promoted by releases that kept no journal.
        target = registry.find_alias(at.name, PREVIOUS)
    if target is None or target == at.version:
        known = registry.describe(at.name)
        raise RegistryError(f"{at.name}: no version is known that was {at.alias} before; give --version ({known})")
    return target
