"""The journal of a registered model: every move of an alias, in one order that all processes agree on.

MLflow sets an alias without asking what it was, so two promotions at once would both
succeed and the last one would win unseen. But it numbers the versions of a model one
by one, whoever adds them. The journal is therefore a registered model of its own, in
which each move is a version: it names the move before it, and counts only if that one
is still the last. Whoever adds an entry reads at once whether it counts; nothing is
locked, so a process that is killed leaves nothing behind that others wait for.

An entry that counts but is not ``done`` was interrupted; whoever moves an alias next
finishes it first (`promotion.settle`).
"""

from __future__ import annotations

import getpass
import os
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
from mlflow.tracking import MlflowClient

from models.errors import RegistryError, one_line
from pipelines.registry import JOURNAL_OF
from pipelines.tracking import denied

SUFFIX = "-journal"
LONGEST = 1000
# Some servers drop tags without a value.
NOTHING = "-"
TRIES = 20

Kind = Literal["promote", "force", "rollback"]


@dataclass(frozen=True)
class Move:
    """An alias from one version (None: from nowhere) to another, and why.

    ``after`` is the number of the alias's last entry when this was decided, 0 for none;
    ``run`` the MLflow run that holds the gates' results.
    """

    alias: str
    kind: Kind
    to: str
    origin: str | None
    after: int
    why: str
    run: str = ""


@dataclass(frozen=True)
class Entry:
    """A move as the journal holds it; ``state`` is ``done``, ``begun``, ``overtaken`` or ``abandoned``."""

    number: int
    move: Move
    by: str
    at: str
    state: str


def whoami() -> str:
    """The name under which moves are recorded: that of the tracking server's login, else the system's."""
    try:
        return os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def now() -> str:
    """UTC time for people and for sorting, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def read_journal(name: str) -> list[Entry]:
    """All entries of a registered model's journal, oldest first; none where nothing was ever moved.

    Raises:
        RegistryError: the store refuses.
    """
    quoted = f"{name}{SUFFIX}".replace("'", "")
    try:
        versions: list[ModelVersion] = []
        token = None
        while True:
            page = MlflowClient().search_model_versions(f"name = '{quoted}'", max_results=1000, page_token=token)
            versions += page
            token = page.token
            if not token:
                break
    except MlflowException as error:
        raise RegistryError(f"{name}{SUFFIX}: cannot be read ({one_line(error)[:200]})") from None
    entries = [_entry(v) for v in sorted(versions, key=lambda v: int(v.version)) if JOURNAL_OF in v.tags]
    return _judged(entries)


def _entry(version: ModelVersion) -> Entry:
    tags = version.tags
    after = int(tags["after"]) if tags.get("after", "").isdigit() else -1
    kind: Kind = tags["kind"] if tags.get("kind") in ("promote", "force", "rollback") else "promote"  # type: ignore[assignment]
    move = Move(tags.get("alias", ""), kind, tags.get("to", ""), _known(tags.get("from")), after, tags.get("why", ""))
    move = replace(move, run=_known(tags.get("run")) or "")
    return Entry(int(version.version), move, tags.get("by", ""), tags.get("at", ""), tags.get("state", "begun"))


def _known(text: str | None) -> str | None:
    return None if text in (None, "", NOTHING) else text


def _judged(entries: Iterable[Entry]) -> list[Entry]:
    """Mark those that were overtaken: the move they follow was not the alias's last any more.

    >>> one = Entry(4, Move("production", "promote", "2", "1", 0, ""), "a", "", "done")
    >>> [e.state for e in _judged([one, replace(one, number=5), replace(one, number=6, move=replace(one.move, after=4))])]
    ['done', 'overtaken', 'done']
    """
    last: dict[str, int] = {}
    judged = []
    for entry in entries:
        if entry.move.after == last.get(entry.move.alias, 0):
            last[entry.move.alias] = entry.number
            judged.append(entry)
        else:
            judged.append(replace(entry, state="overtaken"))
    return judged


def counting(entries: Sequence[Entry], alias: str) -> list[Entry]:
    """An alias's entries that count, oldest first."""
    return [e for e in entries if e.move.alias == alias and e.state != "overtaken"]


def append(name: str, move: Move) -> Entry:
    """Add a move; the entry tells whether it counts.

    Raises:
        RegistryError: the store refuses, or nobody may write here.
    """
    client, journal, token = MlflowClient(), f"{name}{SUFFIX}", uuid.uuid4().hex
    tags = {JOURNAL_OF: name, "alias": move.alias, "kind": move.kind, "to": move.to, "from": move.origin or NOTHING}
    tags |= {"after": str(move.after), "why": move.why[:LONGEST], "by": whoami(), "at": now(), "run": move.run or NOTHING}
    tags["token"] = token
    said = f"{move.alias}: {move.origin or 'nothing'} -> {move.to} ({move.kind} by {tags['by']}): {move.why[:LONGEST]}"
    try:
        _open_journal(client, name, journal)
        for attempt in range(TRIES):
            try:
                # The source makes the entry a link to the version in MLflow's pages.
                made = client.create_model_version(
                    journal, f"models:/{name}/{move.to}", tags=tags, description=said, await_creation_for=0
                )
                number = int(made.version)
                break
            except MlflowException as error:
                # Others add entries too; one that was written although the answer got lost is found by its token.
                found = [v for v in client.search_model_versions(f"name = '{journal}'") if v.tags.get("token") == token]
                if found:
                    number = int(found[0].version)
                    break
                if attempt == TRIES - 1 or denied(error):
                    raise
                time.sleep(0.05 * (attempt + 1))
    except MlflowException as error:
        hint = f"; you need the right to edit {name} and {journal}" if denied(error) else ""
        raise RegistryError(f"{journal}: cannot be written ({one_line(error)[:200]}){hint}") from None
    return next(e for e in read_journal(name) if e.number == number)


def _open_journal(client: MlflowClient, name: str, journal: str) -> None:
    try:
        client.get_registered_model(journal)
    except MlflowException:
        try:
            about = f"Every move of an alias of {name}, one version each; written by planes-registry, read by its history."
            client.create_registered_model(journal, tags={JOURNAL_OF: name}, description=about)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise


def mark(name: str, entry: Entry, state: Literal["done", "abandoned"]) -> None:
    """Note how an entry ended.

    Raises:
        RegistryError: the store refuses.
    """
    try:
        MlflowClient().set_model_version_tag(f"{name}{SUFFIX}", str(entry.number), "state", state)
    except mlflow.MlflowException as error:
        raise RegistryError(f"{name}{SUFFIX}: cannot be written ({one_line(error)[:200]})") from None
