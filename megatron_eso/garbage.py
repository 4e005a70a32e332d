"""When Python looks for objects that only refer to each other.

What a program imports is half a million objects that stay. To look through them again and again is a
fifth of the time of a start; later one look takes 0.4 s, at a moment of its own on each rank, and all
others wait for it; at the end it is done a few times more.
"""

import gc

_USUAL = gc.get_threshold()


def look_rarely() -> None:
    """Look a hundred times less often: for a program that starts."""
    gc.set_threshold(100 * _USUAL[0], *_USUAL[1:])


def look_at_new_objects() -> None:
    """Look as often as usual, and never at what is there now: for a program that has started."""
    gc.freeze()
    gc.set_threshold(*_USUAL)


def look_no_more() -> None:
    """Look at nothing again: for a program that ends, whose memory goes with it."""
    gc.freeze()
