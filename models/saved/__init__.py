"""A model as a folder: its description, its allowed files, how it is written and loaded."""
