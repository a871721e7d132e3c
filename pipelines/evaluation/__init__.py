"""Predictions and ground truth to metrics and figures; knows no MLflow and no command line."""
