"""Files to pixels: one decoder for whole images and windows."""
