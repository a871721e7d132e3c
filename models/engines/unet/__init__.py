"""Segmentation of a plane inside its box crop: U-Nets and the course's own network."""
