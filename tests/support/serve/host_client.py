"""A process on one of several hosts (`benchmarks.serving.hosts`) that sends HTTP requests to a service on that host."""

from __future__ import annotations

import contextlib
import http.client
import json
import multiprocessing
import threading
from typing import Any

from benchmarks.serving.hosts import Host, enter
from tests.support.waiting import join

HTTP_PORT = 8000
ANSWER_TIMEOUT_S = 120.0
NUM_TOKENS = 300


class Client:
    """A process on the router's host that sends HTTP requests to it."""

    def __init__(self, host: Host) -> None:
        self.pipe, theirs = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(target=_client, args=(host.name, theirs), daemon=True)
        process.start()
        theirs.close()

    def ask(self, *command: Any) -> Any:
        """The command's result."""
        self.pipe.send(command)
        return self.answer()

    def answer(self) -> Any:
        """The next message from the client."""
        if not self.pipe.poll(ANSWER_TIMEOUT_S):
            raise TimeoutError(f"the client sent nothing within {ANSWER_TIMEOUT_S} s")
        return self.pipe.recv()


def _client(netns: str, pipe: Any) -> None:
    enter(netns)
    while True:
        try:
            command, *details = pipe.recv()
        except EOFError:
            return
        pipe.send(_get(*details) if command == "get" else _streams(pipe, *details))


def _get(path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", HTTP_PORT, timeout=60)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    except OSError as error:
        return 0, str(error)
    finally:
        connection.close()


def _streams(pipe: Any, prompts: list[str]) -> list[tuple[str, str]]:
    """Complete all prompts in parallel, greedily; sends "midway" once every stream runs. (text, error) of each."""
    results = [("", "not finished")] * len(prompts)
    all_started = threading.Barrier(len(prompts) + 1, timeout=60)

    def stream(number: int) -> None:
        try:
            results[number] = _stream(prompts[number], all_started)
        except Exception as error:
            results[number] = ("", repr(error))

    threads = [threading.Thread(target=stream, args=(number,), daemon=True) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    with contextlib.suppress(threading.BrokenBarrierError):
        all_started.wait()
    pipe.send("midway")
    for thread in threads:
        join(thread, "a stream to end", ANSWER_TIMEOUT_S)
    return results


def _stream(prompt: str, all_started: threading.Barrier) -> tuple[str, str]:
    body = {"model": "tiny-moe", "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    connection = http.client.HTTPConnection("127.0.0.1", HTTP_PORT, timeout=100)
    connection.request(
        "POST", "/v1/completions", json.dumps({**body, "stream": True}), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    if response.status != 200:
        return "", f"HTTP {response.status}: {response.read()!r}"
    text, chunks = "", 0
    for line in response:
        data = line.decode().strip().removeprefix("data:").strip()
        if data == "[DONE]":
            return text, ""
        if not data:
            continue
        message = json.loads(data)
        if "error" in message:
            return text, str(message["error"])
        text += message["choices"][0]["text"]
        chunks += 1
        if chunks == 5:
            all_started.wait()
    return text, "the stream ended before [DONE]"
