"""huggingface_hub against a local server: what is fetched, what is refused and how, and what a cut line leaves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fake_hub import TOKEN, FakeHub, fake_hub
from tests.support.model_client import digests, fetch, results_of, start_client
from tests.support.split_checkpoint import NOT_WEIGHTS, TINY, experts_apart, split_tiny
from tests.support.waiting import await_true

INDEX = "model.safetensors.index.json"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as running:
        yield running


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return split_tiny(tmp_path_factory.mktemp("split") / "model", experts_apart)


def test_each_process_fetches_the_files_it_needs(hub: FakeHub, split: Path, tmp_path: Path) -> None:
    commit = hub.add_folder("org/moe", split)
    extra = {**hub.repos["org/moe"][commit], "README.md": b"x", "pytorch_model.bin": b"x", "original/params.json": b"x"}
    commit = hub.add("org/moe", extra)
    env = hub.environment(tmp_path)

    planner, shard, router = results_of(start_client("plan experts:0.3,2.31,2.16 rest", "org/moe", env))
    assert planner.error is None
    assert planner.pinned == f"org/moe@{commit}"
    assert planner.files == {"config.json", INDEX}
    assert shard.files - planner.files == {"layer-0-low.safetensors", "layer-2-high.safetensors"}

    assert router.files - shard.files == {"rest.safetensors", *NOT_WEIGHTS} - {"config.json"}
    assert router.sha256 == {name: digest for name, digest in digests(split).items() if name in router.files}
    assert set(hub.downloads().values()) == {1}, "each file once a node"


def test_a_model_in_one_file_is_fetched_by_all(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/tiny", {name: (TINY / name).read_bytes() for name in ("model.safetensors", *NOT_WEIGHTS)})
    env = hub.environment(tmp_path)
    for process in results_of(start_client("plan experts:0.0 rest", "org/tiny", env)):
        assert "model.safetensors" in process.files
    assert hub.downloads()["model.safetensors"] == 1


def test_two_processes_at_once_download_once(hub: FakeHub, split: Path, tmp_path: Path) -> None:
    commit = hub.add_folder("org/moe", split)
    env = hub.environment(tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="300")
    hub.hold = threading.Event()
    clients = [start_client("experts:1.1", f"org/moe@{commit}", env) for _ in range(2)]
    heads = ("HEAD", f"/org/moe/resolve/{commit}/layer-1-low.safetensors")
    await_true(lambda: hub.requests.count(heads) >= 2, "both have asked for the file", 250)
    hub.hold.set()
    [first], [second] = map(results_of, clients)
    assert first.sha256 == second.sha256
    assert first.error is None
    assert hub.downloads()["layer-1-low.safetensors"] == 1


def test_a_branch_that_moves_between_two_processes_does_not_mix(hub: FakeHub, split: Path, tmp_path: Path) -> None:
    old = hub.add_folder("org/moe", split)
    env = hub.environment(tmp_path)
    pinned = fetch("config", "org/moe", env).pinned
    files = hub.repos["org/moe"][old]
    hub.add("org/moe", {**files, "rest.safetensors": b"new", "config.json": files["config.json"] + b" "})
    router = fetch("rest", pinned, env)
    assert router.sha256 is not None
    assert router.sha256["rest.safetensors"] == digests(split)["rest.safetensors"]
    assert fetch("config", "org/moe", env).pinned != pinned


def test_offline_a_full_cache_will_do_and_an_empty_one_is_named(hub: FakeHub, split: Path, tmp_path: Path) -> None:
    hub.add_folder("org/moe", split)
    env = hub.environment(tmp_path / "full")
    online = fetch("rest", "org/moe", env)
    hub.requests.clear()
    offline = {**env, "HF_HUB_OFFLINE": "1"}
    found, lacking = results_of(start_client("rest experts:1.1", "org/moe", offline))
    assert found.sha256 == online.sha256, "main, too, is in the cache"
    assert lacking.error is not None
    assert "layer-1-low.safetensors is not in the cache of this node" in lacking.error
    assert "HF_HUB_OFFLINE is set" in lacking.error
    empty = fetch("config", "org/moe", {**offline, "HF_HOME": str(tmp_path / "empty")})
    assert empty.error is not None
    assert empty.error.startswith("org/moe: not in the cache of this node")
    assert hub.requests == []


def test_a_hub_that_is_down_leaves_what_is_cached(hub: FakeHub, split: Path, tmp_path: Path) -> None:
    hub.add_folder("org/moe", split)
    env = hub.environment(tmp_path)
    online = fetch("config", "org/moe", env)
    hub.broken = True
    assert fetch("config", "org/moe", env) == online
    other = fetch("config", "org/other", env)
    assert other.error is not None
    assert other.error.startswith(f"org/other: {hub.url} does not answer")


@pytest.mark.parametrize(
    ("model", "token", "reason"),
    [
        ("org/nothing", "", "no such folder here, and {url} has no such model, or HF_TOKEN may not read it"),
        ("org/private", "", "no such folder here, and {url} has no such model, or HF_TOKEN may not read it"),
        ("org/gated", "", "the model is gated; accept its terms at {url}/org/gated and set HF_TOKEN"),
        ("org/gated", "hf_wrong", "the model is gated; accept its terms at {url}/org/gated and set HF_TOKEN"),
        ("org/open@v9", "", "the model has no branch, tag or commit 'v9'"),
        ("org/open@" + "0" * 40, "", "the model has no branch, tag or commit"),
        ("org/bare", "", "the model has no file config.json"),
        ("org/a--b", "", "Cannot have -- or .."),
    ],
)
def test_what_cannot_be_had_is_refused_by_name_in_one_line(
    hub: FakeHub, tmp_path: Path, model: str, token: str, reason: str
) -> None:
    for repo in ("org/open", "org/private", "org/gated"):
        hub.add(repo, {"config.json": b"{}"})
    hub.add("org/bare", {"weights.bin": b"x"})
    hub.private.add("org/private")
    hub.gated.add("org/gated")
    env = hub.environment(tmp_path, **({"HF_TOKEN": token} if token else {}))
    refused = fetch("config", model, env)
    assert refused.error is not None
    assert refused.error.startswith(model.partition("@")[0])
    assert reason.format(url=hub.url) in refused.error
    assert "\n" not in refused.error


def test_the_right_token_opens_the_gate_and_no_torch_is_loaded(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/gated", {"config.json": b"{}"})
    hub.gated.add("org/gated")
    found = fetch("config", "org/gated", hub.environment(tmp_path, HF_TOKEN=TOKEN))
    assert found.files == {"config.json"}
    assert not found.torch


def test_a_cut_download_is_resumed_or_leaves_no_half_file(hub: FakeHub, split: Path, tmp_path: Path) -> None:
    hub.add_folder("org/moe", split)
    env = hub.environment(tmp_path)
    file = "layer-3-high.safetensors"
    hub.cut[file] = 1
    resumed = fetch("experts:3.31", "org/moe", env)
    assert resumed.sha256 is not None
    assert resumed.sha256[file] == digests(split)[file]

    hub.hold = threading.Event()
    killed = start_client("experts:2.31", "org/moe", env)
    get = ("GET", f"/org/moe/resolve/{hub.refs['org/moe']['main']}/layer-2-high.safetensors")
    await_true(lambda: get in hub.requests, "the download has begun", 250)
    killed.kill()
    killed.communicate(timeout=30)
    hub.hold.set()
    hub.hold = None
    again = fetch("experts:2.31", "org/moe", env)
    assert again.sha256 is not None
    assert again.sha256["layer-2-high.safetensors"] == digests(split)["layer-2-high.safetensors"]
