"""Images that are named by an http(s) address: fetched from hosts that the operator named, and from nowhere else.

An address reaches whatever this machine can reach: the cloud's metadata service, a database, another tenant. So the
host must be on the list, every address that it resolves to must be public, the connection goes to one of the very
addresses that were checked (a name that answers otherwise the second time changes nothing), and no redirect is
followed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Iterable
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from pipelines.serving.errors import ApiError, shown

Hold = Callable[[int], None]
"""Is told how many bytes have come, before they are kept; may raise."""

TIMEOUT_S = 10
_PORTS = {"http": 80, "https": 443}
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # NAT64: an IPv4 address in IPv6's clothes
# Of the internet by their numbers, or so some versions of Python have it: Azure's own service inside its machines,
# addresses of protocols (one is a metadata service of Oracle's), relays of 6to4, and documentation.
_NOT_PUBLIC = [
    ipaddress.ip_network(network)
    for network in ("168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24", "3fff::/20", "5f00::/16")
]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet: not private, loopback, local, reserved or multicast."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address) and (
        ip.ipv4_mapped or ip.sixtofour or ip.teredo or ip in _TRANSLATED or ip.is_site_local
    ):
        return False
    if any(ip in network for network in _NOT_PUBLIC):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class ImageFetcher:
    """Fetches images of allowed hosts.

    Args:
        hosts: `host` or `host:port`; without a port, the scheme's own.
        max_bytes: largest image.
        is_allowed: says of an IP address whether it may be connected to.
    """

    def __init__(self, hosts: Iterable[str], max_bytes: int, is_allowed: Callable[[str], bool] = is_public) -> None:
        self.hosts = {host.lower() for host in hosts}
        self.max_bytes = max_bytes
        self._is_allowed = is_allowed

    async def fetch(self, address: str, hold: Hold = lambda num_bytes: None) -> bytes:
        """The bytes of an image, of which `hold` is told as they come.

        Raises:
            ApiError: 422, the address is not allowed or gives no image of at most `max_bytes`.
            Exception: what `hold` raises.
        """
        url = self._check(address)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self._get(url, hold)
        except _NotAllowed as error:
            raise _refused(str(error)) from error
        except TimeoutError as error:
            raise _failed(f"{url.host} did not send the image within {TIMEOUT_S} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise _failed(f"the image could not be fetched from {url.host} ({type(error).__name__})") from error

    def _check(self, address: str) -> URL:
        scheme, colon, _ = address.partition(":")
        scheme = scheme.lower()[:20]
        if not colon:  # the base64 alone, or a path
            raise _refused("image_url is no address; send a data URI, as data:image/png;base64,...")
        if scheme not in _PORTS or not self.hosts:
            raise _refused(f"image_url is a {scheme} address, which is not fetched; send a data URI (base64)")
        try:
            url = URL(address)
            host, port = (url.raw_host or "").lower().rstrip("."), url.port
            url = url.with_host(host) if host else url  # what is compared is what is asked
        except ValueError as error:
            raise _refused(f"image_url is no valid address: {error}") from error
        if url.user or url.password:
            raise _refused("image_url names a user or a password")
        if _is_ip(host):
            raise _refused("image_url names an IP address in place of a host")
        allowed = f"{host}:{port}" in self.hosts or (host in self.hosts and port == _PORTS[url.scheme])
        if not allowed:
            raise _refused(f"images of {host}:{port} are not fetched here")
        return url

    async def _get(self, url: URL, hold: Hold) -> bytes:
        connector = aiohttp.TCPConnector(resolver=_CheckedResolver(self._is_allowed), use_dns_cache=False)
        # Nothing is unpacked: a few bytes could become gigabytes. No proxy of the environment resolves in our place.
        session = aiohttp.ClientSession(connector=connector, auto_decompress=False, trust_env=False)
        headers = {"accept": "image/*", "accept-encoding": "identity", "user-agent": "flashsloth"}
        async with session, session.get(url, headers=headers, allow_redirects=False) as response:
            if 300 <= response.status < 400:
                raise _NotAllowed(f"{url.host} redirects, which is not followed; send the final address")
            if response.status != 200:
                raise _failed(f"{url.host} answered with status {response.status}")
            if response.headers.get("content-encoding", "identity") != "identity":
                raise _failed(f"{url.host} sent the image compressed once more, which was not asked for")
            data = bytearray()
            async for piece in response.content.iter_chunked(64 * 1024):
                hold(len(piece))
                data += piece
                if len(data) > self.max_bytes:
                    raise _failed(f"the image at {url.host} is larger than {self.max_bytes} bytes")
            return bytes(data)


class _NotAllowed(Exception):
    """A host leads somewhere it must not."""


class _CheckedResolver(AbstractResolver):
    """Resolves a name once, and hands out what passed the check; what it hands out is what is connected to."""

    def __init__(self, is_allowed: Callable[[str], bool]) -> None:
        self._is_allowed = is_allowed

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
        results = []
        for kind, _, protocol, _, place in found:
            ip: Any = place[0]
            # One bad address spoils the name: who has the name's zone could mix them to be lucky sometimes.
            if not self._is_allowed(ip):
                raise _NotAllowed(f"{host} leads to an address that is not public")
            results.append(
                ResolveResult(
                    hostname=host,
                    host=ip,
                    port=port,
                    family=kind,
                    proto=protocol,
                    flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                )
            )
        return results

    async def close(self) -> None:
        """Nothing to close."""


def _is_ip(host: str) -> bool:
    """Whether a host is an address, in any of the ways in which the system reads one ("0x7f.1" is 127.0.0.1)."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        last = host.rpartition(".")[2]
        return last.isdigit() or last.startswith("0x")  # as browsers tell, by the last label
    return True


def _refused(message: str) -> ApiError:
    return ApiError(422, shown(message), "image_url_not_allowed", "messages")


def _failed(message: str) -> ApiError:
    return ApiError(422, shown(message), "image_url_failed", "messages")
