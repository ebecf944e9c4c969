"""Which side of a connection is kept: HAProxy's to a router never is, so that no request is lost on a closing one."""

from __future__ import annotations

import http.client
import threading
from collections.abc import AsyncIterator, Iterator

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from cluster.http.connections import close_where_haproxy_is
from cluster.serve_environment import HAPROXY_SWITCH
from tests.support.waiting import wait_for


@pytest.fixture(params=["1", "0"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, bool]]:
    """(port, whether HAProxy would stand in front) of a server with a route that streams and one that does not."""
    monkeypatch.setenv(HAPROXY_SWITCH, request.param)
    app = FastAPI()

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def parts() -> AsyncIterator[str]:
            yield "a"
            yield "b"

        return StreamingResponse(parts(), headers={"Connection": "keep-alive"})

    @app.get("/live")
    async def live() -> str:
        return "ok"

    app.user_middleware[:] = close_where_haproxy_is()
    running = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        wait_for(lambda: running.started, 30, "the server")
        yield running.servers[0].sockets[0].getsockname()[1], request.param == "1"
    finally:
        running.should_exit = True
        thread.join(30)


def test_a_router_closes_the_connection_after_each_response_behind_haproxy_only(server: tuple[int, bool]) -> None:
    port, behind_haproxy = server
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    for path, status in (("/stream", 200), ("/live", 200), ("/nowhere", 404)):
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        assert response.status == status
        assert path != "/stream" or body == b"ab"
        assert (response.headers.get_all("Connection") == ["close"]) == behind_haproxy, path
        assert (connection.sock is None) == behind_haproxy, "closed by the server"
