"""Lets the ``setup.py`` of mmcv 1.x and mmdet3d 1.x run on Python 3.13 and later.

Both read their version in a function, by ``exec(source)`` and then ``locals()['__version__']``. Since Python 3.13
(PEP 667) a function's ``locals()`` no longer holds what ``exec`` put into it. ``tools/install.py`` puts this folder on
PYTHONPATH while these packages are built, so that Python imports this module when it starts; nothing else does.
"""

import builtins
import sys

plain_exec = builtins.exec


def exec_into_caller(source, *namespaces):
    """``exec`` that, without namespaces, leaves names where the caller's ``locals()`` finds them."""
    caller = sys._getframe(1)
    plain_exec(source, *(namespaces or (caller.f_globals, caller.f_locals)))


if sys.version_info >= (3, 13):
    builtins.exec = exec_into_caller
