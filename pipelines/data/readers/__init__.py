"""Annotation files and image lists to samples."""
