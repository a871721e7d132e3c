"""Registered versions: registration, aliases, gates, promotion, lineage, copies, verification."""
