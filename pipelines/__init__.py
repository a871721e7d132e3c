"""Everything that makes a version: data, training, evaluation, tracking, registry."""
