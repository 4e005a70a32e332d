"""Data: from raw text to tokens on every rank, in an order that is a pure function of the place."""
