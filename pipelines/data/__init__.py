"""Readers, splits, crops and the synthetic airfield; no MLflow."""
