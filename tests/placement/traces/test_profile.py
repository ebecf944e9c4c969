"""`profile`: prompts in, a trace out; the server that it drives is a made-up one."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest

from cluster.serve_environment import free_ports
from placement.command.app import app
from placement.traces.profile import KEY_VARIABLE, Prompt, ServerError, profile_server, read_prompts
from placement.traces.profile import Server as Http
from placement.traces.trace import ActivationTrace
from tests.support.made_up_traces import clique_trace
from tests.support.waiting import join


class Server(BaseHTTPRequestHandler):
    """Answers prompts, and hands out a trace of as many tokens as it was sent prompts since it was told to forget."""

    sent: ClassVar[list[tuple[str, dict]]] = []
    recorded = 0
    key = ""
    broken = False

    def do_GET(self) -> None:
        if self.refused():
            return
        if self.path == "/v1/models":
            self.answer(json.dumps({"data": [{"id": "tiny"}]}).encode())
        elif self.path.partition("?")[0] == "/expertmesh/trace" and Server.recorded:
            self.answer(clique_trace(num_tokens=Server.recorded).to_bytes())
        else:
            self.answer(b'{"error": {"message": "no tokens have been recorded yet"}}', 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return
        if self.broken:
            self.answer(b"out of\nshards", 503)
            return
        with threading.Lock():
            Server.sent.append((self.path, body))
            Server.recorded += 1
        self.answer(b"{}")

    def do_DELETE(self) -> None:
        if not self.refused():
            Server.recorded = 0
            self.answer(b"", 204)

    def refused(self) -> bool:
        if self.key and self.headers.get("Authorization") != f"Bearer {self.key}":
            self.answer(b'{"error": {"message": "no such key"}}', 401)
            return True
        return False

    def answer(self, data: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_args) -> None:
        """Keep quiet."""


@pytest.fixture
def server():
    Server.sent, Server.recorded, Server.key, Server.broken = [], 0, "", False
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        join(thread, "the server to shut down")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "hi"}) + "\n")
    return path


def profile(prompts, url, *more):
    words = ["profile", "--url", url, "--prompts", str(prompts), "--out", str(prompts.parent / "new.npz"),
             "--max-tokens", "3", "--timeout-s", "20", *more]  # fmt: skip
    return app(words, standalone_mode=False)


def one_line(capsys) -> str:
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def test_a_server_is_driven_and_its_trace_written(prompts, server) -> None:
    chat = [{"role": "user", "content": "hello"}]
    prompts.write_text(json.dumps({"prompt": "hi"}) + "\n\n" + json.dumps({"messages": chat}) + "\n")
    Server.recorded = 1000  # of others, before
    assert profile(prompts, server) == 0
    assert ActivationTrace.load_npz(prompts.parent / "new.npz").num_tokens == 2
    common = {"model": "tiny", "max_tokens": 3, "temperature": 0}
    assert sorted(Server.sent) == [
        ("/v1/chat/completions", {"messages": chat, **common}),
        ("/v1/completions", {"prompt": "hi", **common}),
    ]


def test_what_was_recorded_before_can_be_kept(prompts, server) -> None:
    Server.recorded = 10
    assert profile(prompts, server, "--keep") == 0
    assert ActivationTrace.load_npz(prompts.parent / "new.npz").num_tokens == 11
    with pytest.raises(ValueError, match="so keep is not possible"):
        profile_server(server, [Prompt(text="a", domain="code")], keep=True)


def test_tokens_get_the_domain_of_their_prompts(prompts, server) -> None:
    wanted = ["code", "prose", "code", "code"]
    prompts.write_text("".join(json.dumps({"prompt": str(n), "domain": d}) + "\n" for n, d in enumerate(wanted)))
    seen = []
    trace = profile_server(server, read_prompts(prompts), progress=lambda done, total: seen.append((done, total)))
    assert trace.domains == ("code", "prose")
    np.testing.assert_array_equal(trace.domain, [0, 0, 0, 1])
    assert [body["prompt"] for _, body in Server.sent][3] == "1", "a domain at a time"
    assert seen == [(n, 4) for n in range(1, 5)]


def test_the_key_comes_from_the_environment_or_the_caller(prompts, server, monkeypatch, capsys) -> None:
    Server.key = "secret"
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert profile(prompts, server) == 1
    said = one_line(capsys)
    assert "status 401: no such key" in said
    assert KEY_VARIABLE in said
    assert profile(prompts, server, "--api-key", "secret") == 0
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    assert profile(prompts, server) == 0


def test_what_the_server_says_ends_in_one_line(prompts, server, capsys) -> None:
    Server.broken = True
    assert profile(prompts, server) == 1
    assert "/v1/completions: status 503: out of shards" in one_line(capsys)


def test_a_server_that_is_down_or_no_url(prompts, server, capsys) -> None:
    url = f"http://127.0.0.1:{free_ports(1)[0]}"
    assert profile(prompts, url) == 3
    assert f"{url}/v1/models: [Errno 111] Connection refused; is the server up?" in one_line(capsys)
    assert profile(prompts, "localhost:8000") == 1
    assert "localhost:8000: expected a URL like http://" in one_line(capsys)


def test_no_tokens_recorded(server) -> None:
    with pytest.raises(ServerError, match="status 404: no tokens have been recorded yet"):
        Http(server).trace()
    with pytest.raises(ValueError, match="concurrency is 0"):
        profile_server(server, [Prompt(text="a")], concurrency=0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "[]", "a.jsonl:1: expected an object with prompt or messages"),
        ("a.jsonl", '{"prompt": ""}', "a.jsonl:1: expected an object"),
        ("a.jsonl", "\n{", "a.jsonl:2: .*"),
        ("a.jsonl", '{"prompt": "x", "domain": 3}', "domain is 3, expected a name"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": "y", "domain": "law"}', "a.jsonl:2: some prompts have a domain"),
        ("a.txt", "\n", "a.txt: no prompts"),
    ],
)
def test_bad_prompts_are_named(tmp_path, name, text, message) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_a_line_of_text_is_a_chat(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("Hello!\n\nWho are you?\n")
    assert [prompt.request()[0] for prompt in read_prompts(tmp_path / "a.txt")] == ["/v1/chat/completions"] * 2


@pytest.mark.parametrize("url", ["foo", "http://", "http://127.0.0.1:abc", "http://[::1", "ftp://127.0.0.1"])
def test_what_is_no_address_is_refused_before_anything_is_sent(url: str) -> None:
    with pytest.raises(ServerError, match="expected a URL like"):
        profile_server(url, [Prompt(text="hi")])


def test_a_bound_that_nothing_can_keep_is_refused() -> None:
    with pytest.raises(ServerError, match="timeout_s is 0, expected more than 0"):
        profile_server("http://127.0.0.1:9", [Prompt(text="hi")], timeout_s=0)
