"""Detectron2's own trainer, with hooks that log to ours; imported on use."""
