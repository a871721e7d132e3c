"""A scoring job: its manifest, shards, resuming, tables and exports; knows a folder, no MLflow."""
