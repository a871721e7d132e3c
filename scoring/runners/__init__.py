"""What executes a scoring job."""
