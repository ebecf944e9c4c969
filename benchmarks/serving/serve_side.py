"""The side of a benchmark inside the cluster: it deploys Serve configs on a running Ray cluster and sends requests.

    python -m benchmarks.serving.serve_side RAY_ADDRESS PORT

It reads orders as JSON lines, answers each with one line, and ends with its standard input:

    {"deploy": SERVE_CONFIG}    restarts the shards; answers once every router is connected to every shard
    {"run": [PROMPT, ...], "new_tokens": N, "concurrency": C}    answers {"seconds", "tokens", "prompt_tokens"}
    {"get" | "delete": PATH}    answers {"status", "body"}; a binary body comes as hexadecimal digits
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

DEPLOY_TIMEOUT_S, REQUEST_TIMEOUT_S = 300.0, 200.0
EXPERTS = "experts"


class ServeSide:
    """Serve on one cluster, through Ray and through HTTP."""

    def __init__(self, address: str, port: int) -> None:
        import ray
        from ray import serve

        self._port = port
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})

    def deploy(self, config: dict[str, Any]) -> dict[str, Any]:
        """Deploy a config. Routers stay if their application's arguments do; shards always restart."""
        from ray import serve

        from cluster.ray_joints import deploy_config

        start_s = time.monotonic()
        if EXPERTS in serve.status().applications:
            serve.delete(EXPERTS)
        deploy_config(config)
        _wait(self._complete, DEPLOY_TIMEOUT_S)
        return {"seconds": time.monotonic() - start_s}

    def _complete(self) -> bool:
        from ray import serve

        applications = serve.status().applications.values()
        if any(application.status != "RUNNING" for application in applications):
            return False  # routers of the previous config may still answer
        if self.request("GET", "/health")["status"] != 200:
            return False
        status = json.loads(self.request("GET", "/expertmesh/status")["body"])
        controller = status["controller"]
        return bool(
            controller
            and controller["complete"]
            and all("endpoint" in shard for shard in controller["shards"])
            and all(
                router["epoch"] == controller["epoch"] and len(router["connected"]) == controller["num_ranks"]
                for router in status["routers"]
            )
        )

    def run(self, prompts: list[str], new_tokens: int, concurrency: int) -> dict[str, float]:
        """Complete all prompts greedily, `concurrency` at a time."""
        model = json.loads(self.request("GET", "/v1/models")["body"])["data"][0]["id"]

        def complete(prompt: str) -> tuple[int, int]:
            body = {"model": model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
            answer = self.request("POST", "/v1/completions", body)
            if answer["status"] != 200:
                raise RuntimeError(f"status {answer['status']}: {answer['body'][:500]}")
            usage = json.loads(answer["body"])["usage"]
            return usage["completion_tokens"], usage["prompt_tokens"]

        start_s = time.perf_counter()
        with ThreadPoolExecutor(concurrency) as pool:
            counts = list(pool.map(complete, prompts))
        seconds = time.perf_counter() - start_s
        return {"seconds": seconds, "tokens": sum(c for c, _ in counts), "prompt_tokens": sum(p for _, p in counts)}

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """{"status", "body"}; status 0 if nothing answered."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=REQUEST_TIMEOUT_S)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
            is_text = "octet-stream" not in response.getheader("Content-Type", "")
            return {"status": response.status, "body": content.decode() if is_text else content.hex()}
        except OSError as error:
            return {"status": 0, "body": str(error)}
        finally:
            connection.close()


def _wait(condition: Callable[[], bool], timeout_s: float) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end_s:
            raise TimeoutError(f"not deployed within {timeout_s} s")
        time.sleep(0.3)


def main() -> None:
    """Carry out orders until standard input ends."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side = ServeSide(sys.argv[1], int(sys.argv[2]))
    for line in sys.stdin:
        order = json.loads(line)
        if "deploy" in order:
            answer: dict[str, Any] = side.deploy(order["deploy"])
        elif "run" in order:
            answer = side.run(order["run"], order["new_tokens"], order["concurrency"])
        else:
            [(method, path)] = order.items()
            answer = side.request(method.upper(), path)
        print(json.dumps(answer), file=results, flush=True)


if __name__ == "__main__":
    main()
