"""The journal of aliases: every move of an alias of any registered model, in one order that all processes agree on.

MLflow sets an alias without asking what it was, so two promotions at once would both
succeed and the last one would win unseen. But it numbers the versions of a model one
by one, whoever adds them. The journal is therefore a registered model of its own,
``planes-journal``, in which each move of any model is a version: it names the move before it,
and counts only if that one is still the last. Whoever adds an entry reads at once whether it counts;
nothing is locked, so a process that is killed leaves nothing behind that others wait for.

Everybody who may promote anything adds to that one journal. So an entry counts only if the model that it
is about carries the entry's token, with a digest of its content and its state, as a tag: setting it takes
the right to edit that very model. An entry that somebody forged or changed in the journal is no entry.

An entry that counts but is not ``committed`` was interrupted; whoever moves an alias next
finishes it first (`promotion.complete_pending`). Release 0.6.0 kept a journal for each model
(``planes-det-journal``); its entries are read as the first ones.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
from mlflow.tracking import MlflowClient

from models.errors import RegistryError, one_line
from pipelines.registry.model_versions import JOURNAL, JOURNAL_OF, Registry
from pipelines.tracking.mlflow_runs import addressed, denied, store_errors

# Journals of 0.6.0, one a model.
SUFFIX = "-journal"
# Tag of a registered model for each move of its aliases, ended by the entry's token: "state digest".
# MLflow's pages do not show tags that begin with its own name.
MOVE_TAG = "mlflow.planes.move."
# What a first move follows.
FIRST = "0"
LONGEST = 1000
# Some servers drop tags without a value.
NOTHING = "-"
TRIES = 20

Kind = Literal["promote", "force", "rollback"]
State = Literal["pending", "committed", "superseded", "aborted"]
# How the states were called in tags until 0.6.1; those journals are read, and 0.6.0's are marked, by these words.
EARLIER: dict[str, State] = {"begun": "pending", "done": "committed", "overtaken": "superseded", "abandoned": "aborted"}


@dataclass(frozen=True)
class Move:
    """An alias from one version (None: from nowhere) to another, and why.

    Attributes:
        alias: that moves.
        kind: of move.
        to: version that the alias points to afterwards.
        origin: version that it pointed to; None for none.
        after: id of the alias's last entry when this was decided, FIRST for none.
        why: the reason given.
        run: MLflow run that holds the gates' results.
    """

    alias: str
    kind: Kind
    to: str
    origin: str | None
    after: str
    why: str
    run: str = ""


@dataclass(frozen=True)
class Entry:
    """A move as the journal holds it.

    Attributes:
        number: of the version in the journal.
        move: what moves.
        by: user.
        at: time.
        state: ``committed``, ``pending``, ``superseded`` or ``aborted``.
        token: what the entry is known by; empty for those of 0.6.0.
    """

    number: int
    move: Move
    by: str
    at: str
    state: str
    token: str = ""

    @property
    def id(self) -> str:
        """What a later move names this one by."""
        return self.token or str(self.number)


def whoami() -> str:
    """The name under which moves are recorded: that of the tracking server's login, else the system's."""
    try:
        return os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def now() -> str:
    """UTC time for people and for sorting, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def read_journal(registry: Registry, name: str) -> list[Entry]:
    """All entries about a registered model, oldest first; none where nothing was ever moved.

    Raises:
        RegistryError: the store refuses.
    """
    with store_errors(f"journal of {name}: cannot be read"):
        earlier = _oldest_first(registry, f"name = '{_quoted(name)}{SUFFIX}'")
        versions = _oldest_first(registry, f"name = '{JOURNAL}' and tags.{JOURNAL_OF} = '{_quoted(name)}'")
        proofs = _proofs(registry, name) if versions else {}
    entries = [_entry(v, "", EARLIER.get(v.tags.get("state", ""), "pending")) for v in earlier if JOURNAL_OF in v.tags]
    for version in versions:
        token = version.tags.get("token", "")
        state, _, digest = proofs.get(token, "").partition(" ")
        if state and digest == _digest(version.tags):
            entries.append(_entry(version, token, EARLIER.get(state) or state))
    return _mark_superseded(_frozen(entries))


def _frozen(entries: Sequence[Entry]) -> list[Entry]:
    """The entries without those that 0.6.0 added to its own journal after an alias was moved through this one."""
    first = {e.move.alias: e.move.after for e in reversed(entries) if e.token}
    return [
        e
        for e in entries
        if e.token or e.move.alias not in first or not first[e.move.alias].isdigit() or e.number <= int(first[e.move.alias])
    ]


def _quoted(name: str) -> str:
    return name.replace("'", "")


def _oldest_first(registry: Registry, condition: str) -> list[ModelVersion]:
    return registry.search_versions(condition)[::-1]


def _proofs(registry: Registry, name: str) -> dict[str, str]:
    """Token -> "state digest" of the moves that the model itself knows of."""
    tags = registry.client.get_registered_model(name).tags
    return {key.removeprefix(MOVE_TAG): value for key, value in tags.items() if key.startswith(MOVE_TAG)}


def _digest(tags: Mapping[str, str]) -> str:
    """Digest of what an entry says, so that nobody can change it in the journal alone."""
    content = [
        tags.get(key, "") for key in (JOURNAL_OF, "token", "alias", "kind", "to", "from", "after", "why", "by", "at", "run")
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _entry(version: ModelVersion, token: str, state: str) -> Entry:
    tags = version.tags
    kind: Kind = tags["kind"] if tags.get("kind") in ("promote", "force", "rollback") else "promote"  # type: ignore[assignment]
    move = Move(
        tags.get("alias", ""),
        kind,
        tags.get("to", ""),
        _known(tags.get("from")),
        tags.get("after", "-"),
        tags.get("why", ""),
    )
    move = replace(move, run=_known(tags.get("run")) or "")
    return Entry(int(version.version), move, tags.get("by", ""), tags.get("at", ""), state, token)


def _known(text: str | None) -> str | None:
    return None if text in (None, "", NOTHING) else text


def _mark_superseded(entries: Iterable[Entry]) -> list[Entry]:
    """Mark those that were superseded: the move they follow was not the alias's last any more.

    >>> one = Entry(4, Move("production", "promote", "2", "1", "0", ""), "a", "", "committed", "x")
    >>> third = replace(one, number=6, token="z", move=replace(one.move, after="x"))
    >>> [e.state for e in _mark_superseded([one, replace(one, number=5, token="y"), third])]
    ['committed', 'superseded', 'committed']
    """
    last: dict[str, str] = {}
    marked = []
    for entry in entries:
        if entry.state != "superseded" and entry.move.after == last.get(entry.move.alias, FIRST):
            last[entry.move.alias] = entry.id
            marked.append(entry)
        else:
            marked.append(replace(entry, state="superseded"))
    return marked


def effective_entries(entries: Sequence[Entry], alias: str) -> list[Entry]:
    """An alias's entries that count, oldest first."""
    return [e for e in entries if e.move.alias == alias and e.state != "superseded"]


def append(registry: Registry, name: str, move: Move) -> Entry:
    """Add a move; the entry tells whether it counts.

    Raises:
        RegistryError: the store refuses, or this user may not edit the model or the journal.
    """
    client, token = registry.client, uuid.uuid4().hex
    tags = {JOURNAL_OF: name, "alias": move.alias, "kind": move.kind, "to": move.to, "from": move.origin or NOTHING}
    tags |= {"after": move.after, "why": move.why[:LONGEST] or NOTHING, "by": whoami(), "at": now()}
    tags |= {"run": move.run or NOTHING, "token": token}
    description = (
        f"{name} {move.alias}: {move.origin or 'nothing'} -> {move.to} ({move.kind} by {tags['by']}): {tags['why']}"
    )
    written = False
    try:
        # First of all, so that who may not edit the model adds nothing.
        client.set_registered_model_tag(name, MOVE_TAG + token, f"pending {_digest(tags)}")
        _open_journal(client)
        written = True
        with addressed(client):
            _add(client, f"models:/{name}/{move.to}", tags, description)
    except MlflowException as error:
        hint = f"; you need the right to edit {name} and {JOURNAL}" if denied(error) else ""
        if written and not hint:
            # The answer may have got lost, the entry not: what was reported as failed must not happen later.
            hint = _give_up(client, name, MOVE_TAG + token, f"aborted {_digest(tags)}")
        raise RegistryError(f"{JOURNAL}: cannot be written ({one_line(error, 200)}){hint}") from error
    added = next((e for e in read_journal(registry, name) if e.token == token), None)
    if added is None:
        raise RegistryError(f"{JOURNAL}: the entry for {name} is not there any more; somebody deleted or changed it")
    return added


def _give_up(client: MlflowClient, name: str, tag: str, value: str) -> str:
    """Mark a move that may be written as aborted; what to say where not even that can be done."""
    try:
        client.set_registered_model_tag(name, tag, value)
    except MlflowException:
        return "; the move may be in the journal all the same, and the next command finishes it then"
    return ""


def _add(client: MlflowClient, source: str, tags: dict[str, str], description: str) -> None:
    for attempt in range(TRIES):
        try:
            # The source makes the entry a link to the version in MLflow's pages.
            client.create_model_version(JOURNAL, source, tags=tags, description=description, await_creation_for=0)
            return
        except MlflowException as error:
            # Others add entries too; one that was written although the answer got lost is found by its token.
            if client.search_model_versions(f"name = '{JOURNAL}' and tags.token = '{tags['token']}'"):
                return
            if attempt == TRIES - 1 or denied(error):
                raise
            time.sleep(0.05 * (attempt + 1))


def _open_journal(client: MlflowClient) -> None:
    try:
        client.get_registered_model(JOURNAL)
    except MlflowException:
        try:
            about = (
                "Every move of an alias of any model, one version each; written by planes-registry, read by its history."
            )
            client.create_registered_model(JOURNAL, tags={JOURNAL_OF: "all models"}, description=about)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise


def mark(registry: Registry, name: str, entry: Entry, state: State) -> None:
    """Note how an entry ended.

    Raises:
        RegistryError: the store refuses.
    """
    client = registry.client
    with store_errors(f"{name}: its tag of a move cannot be written", KeyError):
        if not entry.token:
            word = next(earlier for earlier, now in EARLIER.items() if now == state)
            client.set_model_version_tag(f"{name}{SUFFIX}", str(entry.number), "state", word)
            return
        digest = client.get_registered_model(name).tags[MOVE_TAG + entry.token].partition(" ")[2]
        client.set_registered_model_tag(name, MOVE_TAG + entry.token, f"{state} {digest}")
