"""Samples to training batches: tiles, augmentation, caching, images that cannot be read."""
