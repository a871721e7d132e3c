"""Any predictor on images of any size."""
