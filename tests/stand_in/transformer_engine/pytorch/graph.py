"""What is asked of it around CUDA graphs."""

_is_capturing = False


def is_graph_capturing():
    return _is_capturing


def set_capture_start():
    global _is_capturing
    _is_capturing = True


def set_capture_end():
    global _is_capturing
    _is_capturing = False


def make_graphed_callables(*_, **__):
    raise NotImplementedError


save_fp8_tensors = restore_fp8_tensors = make_graphed_callables
