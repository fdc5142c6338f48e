"""An image's address leads to no place but the hosts that were named, whatever it says and wherever it points."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.serving.errors import ApiError
from pipelines.serving.image_urls import ImageFetcher, is_public
from pipelines.serving.settings import Policy

PRIVATE = """
    127.0.0.1 127.8.8.8 0.0.0.0 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 192.0.2.1
    224.0.0.1 240.0.0.1 255.255.255.255 ::1 :: fe80::1 fc00::1 fd00:ec2::254 ff02::1 ::ffff:127.0.0.1
    ::ffff:8.8.8.8 2002:7f00:1:: 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 2001:0:7f00:1::
    fec0::1 feff::1 168.63.129.16 64:ff9b::a83f:8110 192.0.0.192 192.88.99.1 3fff::1 5f00::1
"""


class ImageServer(ThreadingHTTPServer):
    """Counts connections: a refused address must not lead to a single one."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.connections = 0
        self.port = self.server_address[1]

    def get_request(self) -> tuple[socket.socket, Any]:
        self.connections += 1
        return super().get_request()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, headers, body = {
            "/image.png": (200, {}, b"picture"),
            "/large": (200, {}, b"x" * 101),
            "/missing": (404, {}, b""),
            "/packed": (200, {"content-encoding": "gzip"}, b"picture"),
            "/inside": (302, {"location": "http://169.254.169.254/latest/meta-data/"}, b""),
            "/again": (301, {"location": "/image.png"}, b""),
        }[self.path]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ImageServer]:
    server = ImageServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What names resolve to, each answer once and the last one for ever, in place of the system's resolver."""
    answers: dict[str, list[str]] = {}

    async def getaddrinfo(self: Any, host: str, port: int, **options: Any) -> list[Any]:
        given = answers[host]
        ip = given.pop(0) if len(given) > 1 else given[0]
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        return [(family, socket.SOCK_STREAM, 6, "", (ip, port))]

    monkeypatch.setattr("asyncio.base_events.BaseEventLoop.getaddrinfo", getaddrinfo)
    return answers


def fetch(address: str, *hosts: str, local: bool = False) -> bytes:
    """Fetch, with the loopback address allowed where `local`."""
    options = {"is_allowed": lambda ip: ip == "127.0.0.1"} if local else {}
    return asyncio.run(ImageFetcher(hosts, max_bytes=100, **options).fetch(address))


def refusal(address: str, *hosts: str, local: bool = False) -> ApiError:
    with pytest.raises(ApiError) as caught:
        fetch(address, *hosts, local=local)
    assert (caught.value.status, caught.value.param) == (422, "messages")
    return caught.value


@pytest.mark.parametrize("address", PRIVATE.split())
def test_addresses_that_are_not_of_the_open_internet(address: str) -> None:
    assert not is_public(address)


def test_addresses_that_are() -> None:
    assert all(is_public(address) for address in ("8.8.8.8", "1.1.1.1", "2606:4700:4700::1111"))


def test_an_image_of_an_allowed_host_is_fetched(server: ImageServer, names: dict[str, list[str]]) -> None:
    names["pictures.example"] = ["127.0.0.1"]
    host = f"pictures.example:{server.port}"
    assert fetch(f"http://{host}/image.png", host, local=True) == b"picture"
    assert fetch(f"http://PICTURES.example:{server.port}/image.png", host, local=True) == b"picture"


def test_only_named_hosts_are_asked(server: ImageServer, names: dict[str, list[str]]) -> None:
    names["other.example"] = ["127.0.0.1"]
    host = f"pictures.example:{server.port}"
    for address in (
        f"http://other.example:{server.port}/image.png",
        f"http://pictures.example.other.example:{server.port}/image.png",
        f"http://pictures.example@other.example:{server.port}/image.png",
        f"http://user:secret@{host}/image.png",
        f"http://pictures.example\\@other.example:{server.port}/image.png",
        f"http://other.example:{server.port}#@{host}/image.png",
        "http://pictures.example/image.png",  # another port than the one that is allowed
        "http://[::1/x",
        "http://",
    ):
        assert refusal(address, host, local=True).code == "image_url_not_allowed", address
    assert server.connections == 0


def test_a_host_is_named_bare_in_any_case(server: ImageServer, names: dict[str, list[str]]) -> None:
    (host,) = Policy(image_hosts=[f"Pictures.EXAMPLE:{server.port}"]).image_hosts
    names["pictures.example"] = ["127.0.0.1"]
    assert fetch(f"http://pictures.example:{server.port}/image.png", host, local=True) == b"picture"


def test_a_dot_at_the_end_of_a_host_changes_nothing(server: ImageServer, names: dict[str, list[str]]) -> None:
    names["images.test"] = ["127.0.0.1"]
    fetcher = ImageFetcher([f"images.test:{server.port}"], 100, lambda address: True)
    assert asyncio.run(fetcher.fetch(f"http://IMAGES.test.:{server.port}/image.png")) == b"picture"


def test_a_name_of_other_letters_is_named_as_dns_has_it(server: ImageServer, names: dict[str, list[str]]) -> None:
    names["xn--bcher-kva.example"] = ["127.0.0.1"]
    (host,) = Policy(image_hosts=[f"xn--bcher-kva.example:{server.port}"]).image_hosts
    assert fetch(f"http://b\u00fccher.example:{server.port}/image.png", host, local=True) == b"picture"


@pytest.mark.parametrize(
    "host",
    [
        *(
            "https://cdn.example/",
            "cdn.example/",
            " cdn.x ",
            "",
            "cdn.example.",
            "a@b.example",
            "*.example",
            "b\u00fccher.example",
        ),
        *("cdn.example:0", "cdn.example:080", "cdn.example:x", "127.0.0.1", "0x7f.1", "[::1]:80", "cdn.example\n"),
    ],
)
def test_what_no_address_could_match_is_no_host(host: str) -> None:
    with pytest.raises(ValidationError, match=r"is no host; write its bare name, as cdn\.example\.com"):
        Policy().changed({"image_hosts": ["cdn.example", host]})


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0x7f.1", "2130706433"])
def test_the_machine_itself_is_refused_even_where_it_is_named(host: str, server: ImageServer) -> None:
    allowed = f"{host.strip('[]')}:{server.port}"
    assert refusal(f"http://{host}:{server.port}/image.png", allowed).code == "image_url_not_allowed"
    assert server.connections == 0


@pytest.mark.parametrize(
    "address", ["file:///etc/passwd", "ftp://a.example/x", "gopher://a.example", "//a.example/x", "/etc/passwd", ""]
)
def test_other_schemes_are_refused(address: str) -> None:
    assert refusal(address, "a.example").code == "image_url_not_allowed"


def test_nothing_is_fetched_by_default() -> None:
    assert "not fetched" in refusal("https://a.example/x.png").message


@pytest.mark.parametrize("ip", ["169.254.169.254", "127.0.0.1", "10.1.2.3", "::1", "fd00::1"])
def test_an_allowed_name_that_leads_inside_is_refused(
    ip: str, server: ImageServer, names: dict[str, list[str]]
) -> None:
    names["pictures.example"] = [ip]
    host = f"pictures.example:{server.port}"
    assert "not public" in refusal(f"http://{host}/image.png", host).message
    assert server.connections == 0


def test_a_name_that_changes_after_the_check_changes_nothing(server: ImageServer, names: dict[str, list[str]]) -> None:
    """What was checked is what is connected to: there is no second question to answer otherwise."""
    host = f"pictures.example:{server.port}"
    names["pictures.example"] = ["127.0.0.1", "127.0.0.2"]
    assert fetch(f"http://{host}/image.png", host, local=True) == b"picture"
    assert names["pictures.example"] == ["127.0.0.2"]
    assert "not public" in refusal(f"http://{host}/image.png", host, local=True).message
    assert server.connections == 1


@pytest.mark.parametrize("path", ["/inside", "/again"])
def test_redirects_are_not_followed(path: str, server: ImageServer, names: dict[str, list[str]]) -> None:
    names["pictures.example"] = ["127.0.0.1"]
    host = f"pictures.example:{server.port}"
    error = refusal(f"http://{host}{path}", host, local=True)
    assert (error.code, "redirects" in error.message) == ("image_url_not_allowed", True)
    assert server.connections == 1


@pytest.mark.parametrize(
    ("path", "message"), [("/large", "larger than 100"), ("/missing", "status 404"), ("/packed", "compressed")]
)
def test_what_is_no_image_of_the_allowed_size(
    path: str, message: str, server: ImageServer, names: dict[str, list[str]]
) -> None:
    names["pictures.example"] = ["127.0.0.1"]
    host = f"pictures.example:{server.port}"
    error = refusal(f"http://{host}{path}", host, local=True)
    assert (error.code, message in error.message) == ("image_url_failed", True)


def test_a_host_that_does_not_answer(names: dict[str, list[str]]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        names["pictures.example"] = ["127.0.0.1"]
        host = f"pictures.example:{unused.getsockname()[1]}"
        assert refusal(f"http://{host}/image.png", host, local=True).code == "image_url_failed"
