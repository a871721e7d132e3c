"""What every engine and the tiling need to run: device, memory, timing."""
