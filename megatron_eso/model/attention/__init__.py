"""Attention over Eso-LM rows: what the rows are, the kernels, and the module Megatron calls."""
