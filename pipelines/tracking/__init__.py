"""MLflow runs, and stores that were moved with their folder."""
