def cast_master_weights_to_fp8(weights, masters, offsets, group, shards=None):
    if weights:
        raise NotImplementedError("the stand-in has no FP8 parameters")
