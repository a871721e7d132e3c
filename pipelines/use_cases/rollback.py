"""An alias moved back to the version that it pointed to before; what loads networks is imported on use."""

from __future__ import annotations

import logging

from pipelines.registry import lineage, promotion
from pipelines.registry.model_versions import Registry, Resolved

log = logging.getLogger(__name__)


def rollback(
    registry: Registry,
    name: str,
    alias: str = promotion.PRODUCTION,
    *,
    version: str | None = None,
    reason: str = "rolled back",
    unchecked: bool = False,
) -> Resolved:
    """Move an alias back, once the version that it goes to is seen to load.

    Args:
        version: number of the version to go to; without it the one that was there before.
        reason: why, for the history.
        unchecked: do not load the version first.

    Returns:
        The version that the alias points to now.

    Raises:
        PlanesError: no such model or version, nothing stood there before, the version does not load.
    """
    registry.aliases_of(name)
    at = promotion.read_alias_state(registry, name, alias)
    if at.finished is not None:
        log.info(f"finished a move that was interrupted: {lineage.format_entry(at.finished)}")
    target = registry.resolve(f"{name}/{version or promotion.rollback_target(registry, at)}")
    if target.version == at.version:
        log.info(f"{target.label} is {at.alias} already")
        return target
    if not unchecked:
        from models.loading import load_model

        load_model(registry.fetch(target), "cpu")
    promotion.move(registry, at, str(target.version), "rollback", reason)
    log.info(f"{target.label} is {at.alias} again, instead of version {at.version or 'none'}: {reason}")
    return target
