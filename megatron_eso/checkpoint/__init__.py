"""Checkpoints: sharded torch_dist folders with a manifest of hashes and, written last, a commit marker."""
