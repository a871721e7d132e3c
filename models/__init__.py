"""Models that travel in a registered version: saved form, loading and prediction."""
