"""Fetches http(s) media that the user allowed, once, into a cache on disk.

Rows are written by somebody else, so an address must not become a way into the user's own network: a public name that
leads to a private address is refused, and so is a redirect to one. An address that itself names a private host (a
server on the local network, say) was put there on purpose and is fetched. Where addresses come from strangers, as in
requests to a server, :func:`fetch_public` fetches from public addresses alone, and keeps nothing.
"""

from __future__ import annotations

import functools
import hashlib
import http.client
import ipaddress
import os
import ssl
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from finesight.errors import MediaError

MAX_URL_BYTES = 512 * 2**20
TIMEOUT_S = 20.0  # to connect and between two pieces
DEADLINE_S = 300.0  # for the whole of it
_MAX_REDIRECTS = 5

_Content = TypeVar("_Content")


def fetch(url: str, *, timeout_s: float = TIMEOUT_S, max_bytes: int = MAX_URL_BYTES) -> Path:
    """The content of an http(s) address as a file in the cache; fetched only if it is not there yet.

    The cache is `$FINESIGHT_CACHE/media`, by default `~/.cache/finesight/media`; remove files there to fetch anew.

    Raises:
        MediaError: the address cannot be fetched, is too large, too slow, or leads to a private address.
    """
    target = _cache_folder() / hashlib.sha256(url.encode()).hexdigest()
    if target.exists():
        return target
    if urlsplit(url).scheme.lower() not in ("http", "https"):
        raise MediaError(f"{url!r}: only http(s) addresses are fetched")
    opener = urllib.request.build_opener(_Redirects(), _Http(), _Https())
    return _opened(opener, url, timeout_s, lambda response: _store(response, url, target, max_bytes))


def fetch_public(url: str, *, timeout_s: float = TIMEOUT_S, deadline_s: float = DEADLINE_S, max_bytes: int = MAX_URL_BYTES) -> bytes:
    """The content of an http(s) address on the public network. Nothing is kept, and no proxy is asked.

    Raises:
        MediaError: the address cannot be fetched, is too large, too slow, or is or leads to a private address.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise MediaError(f"{url!r} is no address: {error}") from None
    if parts.scheme.lower() not in ("http", "https") or _names_private_host(parts.hostname or ""):
        raise MediaError(f"{url!r}: only public http(s) addresses are fetched")
    # A proxy would look names up itself, and could be led to private addresses.
    handlers = (urllib.request.ProxyHandler({}), _Redirects(), _Http(public_only=True), _Https(public_only=True))

    def read(response: Any) -> bytes:
        started, content = time.monotonic(), bytearray()
        while piece := response.read1(2**16):
            content += piece
            if len(content) > max_bytes or time.monotonic() - started > deadline_s:
                raise MediaError(f"{url!r} holds more than {max_bytes:,} bytes, or takes longer than {deadline_s:.0f} s")
        return bytes(content)

    return _opened(urllib.request.build_opener(*handlers), url, timeout_s, read)


def _opened(opener: urllib.request.OpenerDirector, url: str, timeout_s: float, read: Callable[[Any], _Content]) -> _Content:
    """What is read from the response to an address."""
    request = urllib.request.Request(url, headers={"User-Agent": "finesight"})
    try:
        with opener.open(request, timeout=timeout_s) as response:
            return read(response)
    except MediaError:
        raise
    except urllib.error.HTTPError as error:
        raise MediaError(f"{url!r} cannot be fetched: the server answers {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = getattr(error, "reason", None) or error
        if isinstance(cause, MediaError):
            raise cause from None
        raise MediaError(f"{url!r} cannot be fetched: {cause}") from None


def _store(response: Any, url: str, target: Path, max_bytes: int) -> Path:
    """Copies a response to the cache; the file appears there only once it is whole."""
    declared = response.headers.get("Content-Length")
    if declared is not None and declared.isdigit() and int(declared) > max_bytes:
        raise MediaError(
            f"{url!r} holds {int(declared) / 2**20:.0f} MiB, more than the {max_bytes / 2**20:.0f} MiB that are fetched; download it and give its path"
        )
    started, size = time.monotonic(), 0
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix="part-")
    try:
        with os.fdopen(handle, "wb") as out:
            while piece := response.read(2**16):
                size += len(piece)
                if size > max_bytes:
                    raise MediaError(
                        f"{url!r} holds more than the {max_bytes / 2**20:.0f} MiB that are fetched; download it and give its path"
                    )
                if time.monotonic() - started > DEADLINE_S:
                    raise MediaError(f"{url!r} took longer than {DEADLINE_S:.0f} s; download it and give its path")
                out.write(piece)
        if declared is not None and declared.isdigit() and size < int(declared):
            raise MediaError(f"{url!r} broke off after {size} of {declared} bytes; try again")
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)
    return target


def _cache_folder() -> Path:
    if own := os.environ.get("FINESIGHT_CACHE"):
        return Path(own).expanduser() / "media"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finesight" / "media"


def _is_private(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return not ip.is_global or ip.is_multicast


def _names_private_host(host: str) -> bool:
    """Whether the address itself, as written, names a private host."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return _is_private(host)
    except ValueError:
        return False


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = _MAX_REDIRECTS

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> urllib.request.Request | None:
        parts = urlsplit(newurl)
        if parts.scheme.lower() not in ("http", "https"):
            raise MediaError(f"{req.full_url!r} redirects to {newurl!r}, which is not http(s)")
        same_host = parts.hostname == urlsplit(req.full_url).hostname
        if not same_host and _names_private_host(parts.hostname or ""):
            raise MediaError(f"{req.full_url!r} redirects to a private address ({parts.hostname}); download it and give its path")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_peer(connection: http.client.HTTPConnection, private_allowed: bool) -> None:
    """Looks at the address really connected to: a name may resolve differently from one look-up to the next."""
    peer = connection.sock.getpeername()[0]
    if not private_allowed and _is_private(peer):
        connection.close()
        raise MediaError(
            f"{connection.host!r} leads to the private address {peer}; if that is meant, write the address itself, or download the file"
        )


class _HttpConnection(http.client.HTTPConnection):
    def __init__(self, *args: Any, private_allowed: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._private_allowed = private_allowed

    def connect(self) -> None:
        super().connect()
        _check_peer(self, self._private_allowed)


class _HttpsConnection(_HttpConnection, http.client.HTTPSConnection):
    """The same over TLS: what is checked comes after the connection of the second base."""


class _Http(urllib.request.HTTPHandler):
    def __init__(self, public_only: bool = False) -> None:
        super().__init__()
        self._public_only = public_only

    def http_open(self, req: urllib.request.Request) -> Any:
        # A proxy is the user's own choice, and it is the proxy that connects to the host.
        allowed = not self._public_only and (req.has_proxy() or _names_private_host(urlsplit(req.full_url).hostname or ""))
        return self.do_open(functools.partial(_HttpConnection, private_allowed=allowed), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, public_only: bool = False) -> None:
        self._tls = ssl.create_default_context()
        self._public_only = public_only
        super().__init__(context=self._tls)

    def https_open(self, req: urllib.request.Request) -> Any:
        through_proxy = getattr(req, "_tunnel_host", None) is not None
        allowed = not self._public_only and (through_proxy or _names_private_host(urlsplit(req.full_url).hostname or ""))
        return self.do_open(functools.partial(_HttpsConnection, private_allowed=allowed), req, context=self._tls)
