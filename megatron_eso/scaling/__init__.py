"""Scaling studies: a grid of runs, their results, and the laws fitted to them; torch-free."""
