"""Names in annotations of Megatron's fused MLP, which is not used."""


class FusibleOperation:
    pass


class Sequential:
    pass
