"""Layers; only what is asked for by this path."""

from transformer_engine.pytorch.module import base

__all__ = ["base"]
