"""Checkpoints: sharded torch_dist folders with a hash manifest and a commit marker written last."""
