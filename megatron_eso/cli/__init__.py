"""The ``megatron-eso`` command: one file a command; heavy imports stand inside the command."""
