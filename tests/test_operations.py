"""The daemon's own pages, asked over real sockets."""

import asyncio
import socket
import time

import pytest
from aiohttp import ClientSession, web

from listener import operations
from listener.errors import SettingsError
from listener.metrics import Metrics
from listener.operations import Operations


async def _get(port: int, path: str, token: str | None = None) -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
    async with ClientSession() as http, http.get(f"http://127.0.0.1:{port}{path}", headers=headers) as reply:
        return reply.status, await reply.text()


async def test_metrics_are_served_on_their_path_only() -> None:
    """/metrics shows the metrics, and a path that does not exist is 404 and not, as elsewhere, metrics."""
    async with Operations(metrics=Metrics().handler(), not_ready=list) as pages:
        status, text = await _get(pages.port, "/metrics")
        assert status == 200
        assert "listener_build_info{" in text
        assert (await _get(pages.port, "/-/redy"))[0] == 404


async def test_ready_gives_the_reasons() -> None:
    """/-/ready is 503 with every reason, and 200 as soon as there is none."""
    reasons = ["no session is up", "the database does not answer"]
    async with Operations(metrics=Metrics().handler(), not_ready=lambda: reasons) as pages:
        assert await _get(pages.port, "/-/ready") == (
            503,
            '{"ready": false, "reasons": ["no session is up", "the database does not answer"]}',
        )
        reasons.clear()
        assert await _get(pages.port, "/-/ready") == (200, '{"ready": true, "reasons": []}')


async def test_health_does_not_depend_on_readiness() -> None:
    """A daemon that is not ready is healthy all the same."""
    async with Operations(metrics=Metrics().handler(), not_ready=lambda: ["nothing works"]) as pages:
        assert (await _get(pages.port, "/-/healthy"))[0] == 200


async def test_health_is_red_after_the_loop_stood_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that stood still longer than the bound is red for a while, then green again."""
    monkeypatch.setattr(operations, "TICK_S", 0.01)
    monkeypatch.setattr(operations, "STALL_S_MAX", 0.1)
    monkeypatch.setattr(operations, "STALL_SHOWN_S", 0.5)
    async with Operations(metrics=Metrics().handler(), not_ready=list) as pages:
        assert (await _get(pages.port, "/-/healthy"))[0] == 200
        blocked_until = time.monotonic() + 0.2
        while time.monotonic() < blocked_until:
            pass
        status, text = await _get(pages.port, "/-/healthy")
        assert status == 503
        assert "stood still for 0." in text
        async with asyncio.timeout(5):
            while (await _get(pages.port, "/-/healthy"))[0] != 200:
                pass


async def test_a_token_guards_all_but_health() -> None:
    """With a token, metrics and reasons need it; a wrong one and none are refused alike."""
    async with Operations(metrics=Metrics().handler(), not_ready=list, token="s3cret") as pages:
        for path in ("/metrics", "/-/ready"):
            assert (await _get(pages.port, path))[0] == 401
            assert (await _get(pages.port, path, "s3cre"))[0] == 401
            assert (await _get(pages.port, path, "s3cret"))[0] == 200
        assert (await _get(pages.port, "/-/healthy"))[0] == 200


@pytest.mark.parametrize(
    ("authorization", "status", "challenge"),
    [
        ("bearer s3cret", 200, None),
        ("BEARER   s3cret", 200, None),
        ("s3cret", 401, 'Bearer realm="listener"'),
        ("Basic s3cret", 401, 'Bearer realm="listener"'),
        ("", 401, 'Bearer realm="listener"'),
        ("Bearer S3cret", 401, 'Bearer realm="listener", error="invalid_token"'),
    ],
)
async def test_a_token_is_shown_by_the_scheme_bearer(
    authorization: str, status: int, challenge: str | None
) -> None:
    """In any case of letters, and by no other scheme nor without one; a refusal says what is asked."""
    async with (
        Operations(metrics=Metrics().handler(), not_ready=list, token="s3cret") as pages,
        ClientSession(headers={"Authorization": authorization}) as http,
        http.get(f"http://127.0.0.1:{pages.port}/-/ready") as reply,
    ):
        assert (reply.status, reply.headers.get("WWW-Authenticate")) == (status, challenge)


async def test_a_token_that_is_no_text_is_a_wrong_one() -> None:
    """Bytes that are no UTF-8, or half a surrogate pair, break nothing."""
    async with Operations(metrics=Metrics().handler(), not_ready=list, token="s3cret") as pages:
        for token in (b"\xff", b"\xed\xa0\x80"):
            reader, writer = await asyncio.open_connection("127.0.0.1", pages.port)
            writer.write(b"GET /metrics HTTP/1.1\r\nHost: here\r\nConnection: close\r\n")
            writer.write(b"Authorization: Bearer " + token + b"\r\n\r\n")
            async with asyncio.timeout(5):
                assert (await reader.read()).split(b" ")[1] == b"401"
            writer.close()
            await writer.wait_closed()


async def test_a_taken_port_is_a_settings_error() -> None:
    """When somebody else listens there, the message names the settings and the cure."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SettingsError, match=f"operations.port {port}.*another listener.*another port"):
            async with Operations(metrics=Metrics().handler(), not_ready=list, port=port):
                pass


async def test_it_ends_while_a_request_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that never goes away delays the end by no more than the bound."""
    monkeypatch.setattr(operations, "SHUTDOWN_S_MAX", 0.1)
    arrived = asyncio.Event()

    async def never(request: web.Request) -> web.Response:
        arrived.set()
        await asyncio.Event().wait()
        return web.Response()

    async with Operations(metrics=never, not_ready=list) as pages:
        reader, writer = await asyncio.open_connection("127.0.0.1", pages.port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await arrived.wait()
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert await reader.read() == b""
    writer.close()
