"""Arguments of `finesight version`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def version() -> None:
    """Show the versions of Finesight and of the libraries underneath, and the device."""
    from finesight.cli.version import versions

    table = Table.grid(padding=(0, 2))
    for name, value in versions().items():
        table.add_row(name, value)
    Console().print(table)
