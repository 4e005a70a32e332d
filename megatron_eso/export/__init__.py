"""Checkpoints of other programs: read into ours, and ours written for them."""
