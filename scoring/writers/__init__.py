"""Outputs of a scoring job, all made from the instance table."""
