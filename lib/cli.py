"""What every command-line script shares: errors a user can mend end in one sentence."""

import os
import sys
from typing import Callable

from .errors import UserError


def run_main(main: Callable[[], object]) -> None:
    """Run a script's ``main``; print a :class:`UserError` as one line and exit 2.

    With ``--debug`` on the command line or ``SPARSEOCC_DEBUG=1`` the traceback is shown instead.
    """
    debug = '--debug' in sys.argv or os.environ.get('SPARSEOCC_DEBUG', '') not in ('', '0')
    try:
        main()
    except UserError as error:
        if debug:
            raise
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('stopped by the user', file=sys.stderr)
        sys.exit(130)
