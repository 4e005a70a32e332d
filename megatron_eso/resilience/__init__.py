"""Signals that end a run in good order."""
