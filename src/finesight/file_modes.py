"""Files that others may read as far as the user's umask lets them: safetensors makes its files readable by their owner alone."""

from __future__ import annotations

import tempfile
from pathlib import Path


def give_usual_mode(folder: Path) -> None:
    """Gives the files in a folder, and in those within it, the mode of a file that is simply opened and written there."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".mode-") as aside:
        probe = Path(aside) / "probe"
        probe.touch()  # to ask for the umask is to change it, for all threads
        mode = probe.stat().st_mode & 0o777
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)
