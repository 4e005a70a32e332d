"""Training: what a run consists of, one step, the loop, and what it reports."""
