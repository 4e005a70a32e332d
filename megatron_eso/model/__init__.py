"""The Eso-LM as Megatron-Core modules: sizes, rotary positions, attention, layer specs, the model."""
