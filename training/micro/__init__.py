"""Trains the editors that `specedit.micro` loads."""
