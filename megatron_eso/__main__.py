"""``python -m megatron_eso`` is the ``megatron-eso`` command."""

from megatron_eso.cli.main import main

if __name__ == "__main__":
    main()
