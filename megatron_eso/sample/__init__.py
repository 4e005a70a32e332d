"""Generating rows: which position in which step, the key/value cache, the sampler."""
