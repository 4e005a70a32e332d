"""When Python's garbage collector looks for objects that only refer to each other.

The imports of a program create half a million objects that stay. Looking through them again and again
takes a fifth of the start-up time. Later, one look takes 0.4 s; it comes at a different moment on each
rank, and all others wait. At the end Python looks a few more times.
"""

import gc

_USUAL = gc.get_threshold()


def look_rarely() -> None:
    """Look a hundred times less often; for a program that is starting."""
    gc.set_threshold(100 * _USUAL[0], *_USUAL[1:])


def look_at_new_objects() -> None:
    """Look as often as usual, but never at objects that exist now; for a program that has started."""
    gc.freeze()
    gc.set_threshold(*_USUAL)


def look_no_more() -> None:
    """Never look again at objects that exist now; for a program that is ending and frees its memory."""
    gc.freeze()
