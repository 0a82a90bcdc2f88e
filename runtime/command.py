"""Command: a chapter run from the command line. What a user can cause is one line, and exit code 1.

Reads: nothing of ours.   Read next: files.py.
"""

import os
import sys
from collections.abc import Callable

import jax

ALONE = (
    "another process has gone, or cannot be reached ({}). Start the same command again on all "
    "hosts: the run goes on from its newest checkpoint."
)


def run(main: Callable[[], object]) -> None:
    """Call `main`; of several processes one that fails ends at once, so that the others hear it."""
    try:
        main()
        return
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
    except jax.errors.JaxRuntimeError as error:
        if not jax.distributed.is_initialized():
            raise
        print(f"error: {ALONE.format(str(error).splitlines()[0])}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        os._exit(1)  # an orderly end would wait for the others
    sys.exit(1)
