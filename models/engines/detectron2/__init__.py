"""Models of Detectron2; the library is imported on use."""
