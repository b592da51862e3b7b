"""Whether the Hugging Face Hub can be asked for a checkpoint, and what of it lies in the cache of the machine.

Its client tries again for half a minute where there is no network, and for minutes where a firewall swallows what it
sends. Here one request says beforehand, within seconds, whether there is anybody to ask.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from pathlib import Path

from finesight.errors import ModelError

logger = logging.getLogger(__name__)

# For an answer of the hub; HF_HUB_ETAG_TIMEOUT, which the client itself waits for a header, goes before it.
ANSWER_S = 5.0


def cached_checkpoint(name: str, revision: str | None = None) -> Path | None:
    """The folder in the cache of the hub that holds a checkpoint's config.json; None: it was never fetched."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # not a name that a hub could have
        return None
    return Path(found).parent if isinstance(found, str) else None


def checkpoint_on_hub(name: str, revision: str | None = None) -> str:
    """What the libraries are given for a name on the hub: the name, or its folder in the cache where the hub cannot be asked.

    Raises:
        ModelError: neither can be had.
    """
    reason = why_unreachable()
    if reason is None:
        return name
    from huggingface_hub import constants

    folder = cached_checkpoint(name, revision)
    if folder is None:
        of_revision = "" if revision is None else f" (revision {revision})"
        raise ModelError(
            f"{name}{of_revision} is neither a folder here nor in the cache of the hub ({constants.HF_HUB_CACHE}), and {reason}. "
            f"Set model.name_or_path to a folder that holds the checkpoint (`hf download {name}` fetches it where there is a network), "
            "or HF_ENDPOINT to a mirror of the hub that can be reached."
        )
    if not constants.HF_HUB_OFFLINE:
        logger.warning("%s: %s is taken as it lies in the cache (%s).", reason, name, folder)
    return str(folder)


def why_unreachable() -> str | None:
    """Why the hub cannot be asked; None: it answered. Whatever it answers, errors included, is left to who asks for a file."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) forbids to fetch it"
    wait_s = float(constants.HF_HUB_ETAG_TIMEOUT) if os.environ.get("HF_HUB_ETAG_TIMEOUT") else ANSWER_S
    # In a thread, since a time limit of the client holds for each address of the hub, and not for finding them.
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(_refusal(constants.ENDPOINT, wait_s)), daemon=True).start()
    try:
        refusal = answers.get(timeout=wait_s)
    except queue.Empty:
        refusal = f"no answer within {wait_s:g} s (HF_HUB_ETAG_TIMEOUT sets how long to wait)"
    return None if refusal is None else f"{constants.ENDPOINT} cannot be reached ({refusal})"


def _refusal(endpoint: str, wait_s: float) -> str | None:
    """What keeps a single request from being answered; None: nothing does."""
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=wait_s)
    except Exception as error:  # of the HTTP library, which is another one from version to version
        return str(error) or type(error).__name__
    return None
