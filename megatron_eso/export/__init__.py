"""Exchange with other programs: their checkpoints read into ours, and ours written for them."""
