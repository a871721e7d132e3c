"""The drawn airfield: scenes, ground, aircraft."""
