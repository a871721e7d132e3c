"""May a version move to an alias? Evaluate both on the same data, decide, move, and say why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mlflow.tracking import MlflowClient

from models.errors import RegistryError
from pipelines.evaluation import Evaluation
from pipelines.registry import Resolved, describe, find_alias, resolve, set_alias


@dataclass(frozen=True)
class Gate:
    """What a candidate must show: ``metric`` of at least ``minimum``, and ``min_gain`` over the present version.

    A ``min_gain`` below 0 allows a loss of that size; otherwise a tie leaves the
    present version where it is.
    """

    metric: str
    minimum: float = 0.0
    min_gain: float = 0.0


@dataclass(frozen=True)
class Decision:
    """Whether the alias may move, why, and the values it rests on."""

    passed: bool
    reason: str
    candidate: float
    present: float | None


def decide(gate: Gate, candidate: float, present: float | None) -> Decision:
    """Apply a gate to the candidate's value and the present version's (None: there is none).

    >>> decide(Gate("AP", 0.5, 0.01), 0.62, 0.6).passed
    True
    >>> decide(Gate("AP", 0.5), 0.6, 0.6).reason
    'AP 0.6000 equals the present version: it stays'
    """
    name = gate.metric
    if not candidate >= gate.minimum:
        return Decision(False, f"{name} {candidate:.4f} is below the minimum {gate.minimum:.4f}", candidate, present)
    if present is None:
        reason = f"{name} {candidate:.4f} reaches the minimum {gate.minimum:.4f}; first version there"
        return Decision(True, reason, candidate, None)
    gain = candidate - present
    if gain == 0 and gate.min_gain >= 0:
        return Decision(False, f"{name} {candidate:.4f} equals the present version: it stays", candidate, present)
    if gain < gate.min_gain:
        reason = f"{name} {candidate:.4f} against {present:.4f}: gain {gain:+.4f} is below {gate.min_gain:+.4f}"
        return Decision(False, reason, candidate, present)
    reason = f"{name} {candidate:.4f} against {present:.4f}: gain {gain:+.4f}, at least {gate.min_gain:+.4f} was asked"
    return Decision(True, reason, candidate, present)


def present_version(name: str, alias: str) -> Resolved | None:
    """The version that an alias points to now, if any."""
    number = find_alias(name, alias)
    return None if number is None else resolve(f"{name}/{number}")


def compare_on_same_data(
    candidate: Resolved, present: Resolved | None, evaluate: Callable[[Resolved], Evaluation]
) -> tuple[Evaluation, Evaluation | None]:
    """Evaluate both versions now, with one function, so that the data cannot differ."""
    return evaluate(candidate), None if present is None else evaluate(present)


def move_alias(candidate: Resolved, present: Resolved | None, alias: str, reason: str) -> None:
    """Point ``alias`` to the candidate, ``previous`` to what was there, and tag the version with the reason.

    Raises:
        RegistryError: the alias moved meanwhile.
    """
    if candidate.name is None or candidate.version is None:
        raise RegistryError(f"{candidate.asked}: only a registered version can be promoted, not a folder")
    now = find_alias(candidate.name, alias)
    if now != (None if present is None else present.version):
        raise RegistryError(f"{candidate.name}: {alias} moved to version {now} meanwhile; {describe(candidate.name)}")
    client = MlflowClient()
    client.set_model_version_tag(candidate.name, candidate.version, f"promoted_to_{alias.lower()}", reason)
    set_alias(candidate.name, alias, candidate.version)
    if present is not None and present.version is not None:
        set_alias(candidate.name, "previous", present.version)
