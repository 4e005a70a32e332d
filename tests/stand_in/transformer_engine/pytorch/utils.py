"""Only imported, for graphs of Megatron's own."""


def make_weak_ref(x):
    raise NotImplementedError
