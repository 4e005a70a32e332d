"""megatron_eso: distributed pretraining of Eso-LM language models on Megatron-Core."""

__version__ = "0.1.0"
