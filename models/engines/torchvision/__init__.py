"""Faster R-CNN and Mask R-CNN of torchvision."""
