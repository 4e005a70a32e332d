"""The ``megatron-eso`` command: one file per command; heavy imports stand inside the command."""
