"""The door to Megatron-Core: device, groups, patches, parallel losses, optimizer, schedules.

Only this package, ``model`` and ``checkpoint`` import ``megatron`` or ``transformer_engine``.
"""
