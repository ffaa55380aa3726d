"""Compilation of numeric loops with Numba, on their first call."""

import numba


def jit(function):
    """Compile ``function`` on first call, to run without the GIL; keep the result on disk where possible.

    Strict floating point: nothing is reordered or fused, so results do not depend on the machine.
    """
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no folder to keep it in can be written
        return numba.njit(nogil=True)(function)


def inlined(function):
    """The same for a function that is compiled into its callers: a call with many arguments costs time."""
    return numba.njit(nogil=True, inline='always')(function)
