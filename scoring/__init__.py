"""Everything that uses a version: batch scoring, its outputs, comparison."""
