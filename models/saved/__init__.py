"""A model as a folder: what it says, what it may hold, how it is written and loaded."""
