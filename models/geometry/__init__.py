"""Boxes and masks as arrays; no torch."""
