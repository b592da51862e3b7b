"""The command `finesight`. Thin: it reads arguments, calls the library and prints.

Nothing heavy is imported before a command needs it, so that `finesight --help` answers at once.
"""

from __future__ import annotations

from finesight.cli.app import app, main

__all__ = ["app", "main"]
