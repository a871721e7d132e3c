"""Training loops; no MLflow and no command line."""
