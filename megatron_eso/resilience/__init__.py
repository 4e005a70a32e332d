"""Runs that survive: signals, checks before hours of work."""
