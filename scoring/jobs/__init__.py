"""A scoring job: its manifest, shards, resuming, tables; and its MLflow run."""
