"""Scores of held-out data: NELBO, exact likelihood and its bound, perplexity."""
