"""Start processes, on this machine and on clusters. Nothing here imports torch."""
