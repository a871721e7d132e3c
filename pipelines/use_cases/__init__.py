"""What a user does with versions (train, import, compose, ablate, promote, roll back), as functions that commands call."""
