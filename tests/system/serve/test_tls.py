"""The service with TLS between routers and shards: the tokens of the service without, also when a shard dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from experts.protocol.errors import ShardError
from experts.protocol.membership import ShardEndpoint
from experts.protocol.secret import MeshSecret
from experts.transports.control import open_control
from experts.transports.tls.identity import TlsIdentity
from tests.support.certificates import Authority
from tests.support.echo_shard import deadline_in
from tests.support.serve.deploying import still
from tests.support.serve.service import Service, running_service
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(900)  # it starts two services
NUM_TOKENS = 600  # far more than are sent before a client reads its second chunk
RECOVERY_S = 120.0


def connected(service: Service) -> bool:
    """Whether all three shards serve, and the router has a TCP pair with each."""
    [router] = service.status()["routers"]
    return still(service, 3) is not None and list(router["transports"].values()) == ["tcp"] * 3


def test_tokens_are_those_without_tls_also_when_a_shard_is_killed(service: Service, tmp_path: Path) -> None:
    expected = service.greedy(NUM_TOKENS)
    ours, other = Authority(tmp_path / "ours", "ours"), Authority(tmp_path / "other", "other")

    def encrypt(config: dict[str, Any]) -> None:
        experts, llm, _ = (application["args"] for application in config["applications"])
        experts["mesh"] = {"tls": ours.issue("shard").model_dump()}
        llm["transport"] = {"name": "tcp", "tls": ours.issue("router").model_dump()}

    with running_service(encrypt) as encrypted:
        assert connected(encrypted), encrypted.status()
        assert encrypted.greedy(NUM_TOKENS) == expected

        endpoint = ShardEndpoint.from_dict(encrypted.shards()[0]["endpoint"])
        strangers = {None: "it wants TLS", TlsIdentity(other.issue("stranger")): "certificate is refused"}
        for identity, answer in strangers.items():
            with pytest.raises(ShardError, match=answer):
                open_control(endpoint, MeshSecret.generate(), deadline_in(30), tls=identity)

        victim = encrypted.shards()[1]["pid"]
        kill = lambda index: os.kill(victim, signal.SIGKILL) if index == 1 else None  # noqa: E731
        assert encrypted.greedy(NUM_TOKENS, kill) == expected
        [router] = encrypted.status()["routers"]
        assert router["failovers"] > 0
        assert router["fallback_pairs"] == 0, "the other shards have every expert"
        wait_for(lambda: encrypted.shards()[1]["pid"] != victim and connected(encrypted), RECOVERY_S, "rank 1")
        assert encrypted.greedy(NUM_TOKENS) == expected
