"""Compilation of numeric loops with Numba, on their first call."""

import numba


def jit(function):
    """Compile ``function`` on first call, to run without the GIL; keep the result on disk where possible.

    Strict floating point: nothing is reordered or fused, so results do not depend on the machine. A division by
    zero gives an infinity or NaN as in NumPy: checks for it would keep loops from becoming vector instructions.
    """
    options = dict(nogil=True, error_model='numpy')
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to keep it in can be written
        return numba.njit(**options)(function)
