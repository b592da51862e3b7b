"""The command `finesight`. Thin: it reads arguments, calls the library and prints.

Nothing heavy is imported before a command needs it, so that `finesight --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. Exits with 0 when done, 1 when a check found something, 2 on any error, 130 when interrupted.

    The commands are imported here, so that Ctrl-C before they are is answered like any other.

    Args:
        arguments: none: those of the process.
    """
    try:
        from finesight.cli.app import run

        run(arguments)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)
