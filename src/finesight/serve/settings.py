"""What a server allows, and how much."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from finesight.errors import RecipeError


@dataclass(frozen=True)
class ServeSettings:
    """Limits of a server.

    Raises:
        RecipeError: a value is out of its range, or an allowed folder does not exist.
    """

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    api_key: str | None = None  # what clients must present; None: anybody who reaches the address
    batch_size: int = 16  # answers drawn side by side, for each adapter
    max_length_tokens: int = 8192  # prompt and answer together
    max_completion_length: int = 1024  # tokens of an answer where the request says nothing
    queue_size: int = 128  # requests held beyond those that are being answered
    max_body_bytes: int = 32 * 2**20
    timeout_s: float = 300.0  # for a whole request; also what a shutdown waits for those that are held
    allow_urls: bool = False  # fetch media from public http(s) addresses
    allowed_dirs: tuple[Path, ...] = ()  # folders that requests may name files in
    adapter_dirs: tuple[Path, ...] = ()  # folders that clients may load adapters from while the server runs; none: they may not

    def __post_init__(self) -> None:
        positive = ("batch_size", "max_length_tokens", "max_completion_length", "max_body_bytes", "timeout_s")
        for field in fields(self):
            value = getattr(self, field.name)
            if (field.name in positive and value <= 0) or (field.name == "queue_size" and value < 0):
                raise RecipeError(f"Server setting {field.name} is {value}; it must be above 0.")
        if not 0 <= self.port <= 65535:
            raise RecipeError(f"Server setting port is {self.port}; it must be between 0 and 65535.")
        if self.max_completion_length >= self.max_length_tokens:
            raise RecipeError(
                f"Answers of up to {self.max_completion_length} tokens leave no room for a prompt within {self.max_length_tokens}. "
                "Raise max_length_tokens, or lower max_completion_length."
            )
        if self.api_key is not None and not self.api_key.strip():
            raise RecipeError("The API key is empty. Give one, or none at all.")
        for folder in self.allowed_dirs:
            if not folder.is_dir():
                raise RecipeError(f"The folder {folder}, which requests are to name files in, does not exist.")
        for folder in self.adapter_dirs:
            if not folder.is_dir():
                raise RecipeError(f"The folder {folder}, which adapters are to be loaded from, does not exist.")

    @property
    def local_only(self) -> bool:
        """Whether only this machine reaches the server."""
        return self.host in ("127.0.0.1", "localhost", "::1")
