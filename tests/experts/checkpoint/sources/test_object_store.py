"""s3fs against moto's server: the same bytes as from the folder, only complete files, never a mixture of versions."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experts.checkpoint.errors import UnreachableError
from experts.checkpoint.sources.object_store import subfolders
from tests.support.model_client import Fetched, digests, play, results_of, start_client
from tests.support.split_checkpoint import NOT_WEIGHTS, experts_apart, split_tiny

pytest.importorskip("moto", reason="an S3 stand-in needs moto, flask, flask_cors")
pytest.importorskip("flask_cors", reason="an S3 stand-in needs moto, flask, flask_cors")
if importlib.util.find_spec("s3fs") is None:
    pytest.skip("s3:// needs s3fs", allow_module_level=True)

INDEX = "model.safetensors.index.json"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}


class Store:
    """A bucket of its own on moto's server."""

    def __init__(self, client: Any, url: str, requests: list[tuple[str, str]]) -> None:
        self.client, self.url, self.requests = client, url, requests

    def put_folder(self, folder: Path, prefix: str) -> None:
        for path in folder.iterdir():
            self.put(f"{prefix}/{path.name}", path.read_bytes())

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket="models", Key=key, Body=data)

    def downloads(self, name: str) -> int:
        return sum(method == "GET" and path.endswith("/" + name) for method, path in self.requests)

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": self.url, "EXPERTMESH_HOME": str(home), **more}

    def fetch(self, role: str, model: str, home: Path) -> Fetched:
        """What a process with its cache in `home` has in the end; in this process."""
        import s3fs

        with pytest.MonkeyPatch.context() as patch:
            for key, value in self.environment(home).items():
                patch.setenv(key, value)
            s3fs.S3FileSystem.clear_instance_cache()
            return Fetched(**play(role, model))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    import boto3
    import werkzeug.serving
    from moto.server import ThreadedMotoServer

    requests: list[tuple[str, str]] = []
    monkeypatch.setattr(
        werkzeug.serving.WSGIRequestHandler,
        "log_request",
        lambda handler, *args: requests.append((handler.command, handler.path.partition("?")[0])),
    )
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        client = boto3.client(
            "s3", endpoint_url=url, aws_access_key_id="x", aws_secret_access_key="x", region_name="us-east-1"
        )
        client.create_bucket(Bucket="models")
        yield Store(client, url, requests)
        for item in client.list_objects_v2(Bucket="models").get("Contents", []):
            client.delete_object(Bucket="models", Key=item["Key"])
        client.delete_bucket(Bucket="models")
    finally:
        server.stop()


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return split_tiny(tmp_path_factory.mktemp("split") / "model", experts_apart)


def test_each_process_fetches_the_files_it_needs(store: Store, split: Path, tmp_path: Path) -> None:
    store.put_folder(split, "org/moe")
    store.put("org/moe/README.md", b"x")
    planner = store.fetch("plan", "s3://models/org/moe", tmp_path)
    assert planner.error is None
    assert planner.files == {"config.json", INDEX}
    shard = store.fetch("experts:0.3,2.31", planner.pinned, tmp_path)
    assert shard.files - planner.files == {"layer-0-low.safetensors", "layer-2-high.safetensors"}
    router = store.fetch("rest", planner.pinned, tmp_path)
    assert router.files - shard.files == {"rest.safetensors", *NOT_WEIGHTS} - {"config.json"}
    assert router.sha256 == {name: digest for name, digest in digests(split).items() if name in router.files}
    assert {store.downloads(name) for name in router.files} == {1}

    store.requests.clear()
    assert store.fetch("rest", planner.pinned, tmp_path) == router
    assert store.requests == [], "nothing is asked for what is here"


def test_a_source_that_changed_is_not_mixed_with_its_old_files(store: Store, split: Path, tmp_path: Path) -> None:
    store.put_folder(split, "moe")
    planner = store.fetch("plan", "s3://models/moe", tmp_path)
    store.put("moe/layer-0-low.safetensors", b"other weights")
    for home in (tmp_path, tmp_path / "another-node"):
        refused = store.fetch("experts:0.3", planner.pinned, home)
        assert refused.error is not None
        assert "changed" in refused.error
        assert "deploy again" in refused.error
    left = {path.name for path in tmp_path.rglob("*layer-0*")}
    assert left == {"layer-0-low.safetensors.lock"}, "no weights, whole or in part"
    store.put("moe/README.md", b"for people")
    again = store.fetch("plan", "s3://models/moe", tmp_path)
    assert again.pinned != planner.pinned
    assert store.fetch("config", again.pinned, tmp_path).error is None


def test_two_processes_at_once_download_once(store: Store, split: Path, tmp_path: Path) -> None:
    store.put_folder(split, "moe")
    pinned = store.fetch("plan", "s3://models/moe", tmp_path).pinned
    clients = [start_client("experts:1.1", pinned, store.environment(tmp_path)) for _ in range(2)]
    [first], [second] = map(results_of, clients)
    assert first.error is None
    assert first.sha256 == second.sha256
    assert store.downloads("layer-1-low.safetensors") == 1


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("s3://models/nothing", "s3://models/nothing: there is no such folder, or nothing in it"),
        ("s3://nobucket/moe", "s3://nobucket/moe: there is no such folder, or nothing in it"),
        ("s3://models/bare", "s3://models/bare@{}: has no file config.json"),
        ("gs://models/moe", "gs://models/moe: needs the package gcsfs: pip install gcsfs"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name_in_one_line(
    store: Store, tmp_path: Path, model: str, reason: str
) -> None:
    if model.startswith("gs://") and importlib.util.find_spec("gcsfs") is not None:
        pytest.skip("gcsfs is installed")
    store.put("bare/model.safetensors", b"x")
    refused = store.fetch("config", model, tmp_path)
    assert refused.error == reason.format(refused.pinned.partition("@")[2])


def test_a_process_killed_while_it_downloads_leaves_no_half_file(store: Store, split: Path, tmp_path: Path) -> None:
    """What it leaves is a file of another name, and the next one starts over."""
    store.put_folder(split, "moe")
    planned = store.fetch("plan", "s3://models/moe", tmp_path)
    folder = tmp_path / "models" / "s3" / "models" / "moe" / planned.pinned.partition("@")[2]
    (folder / ".layer-1-low.safetensors.part").write_bytes(b"half")
    found: Fetched = store.fetch("experts:1.1", planned.pinned, tmp_path)
    assert found.sha256 is not None
    assert found.sha256["layer-1-low.safetensors"] == digests(split)["layer-1-low.safetensors"]
    assert not list(folder.glob("*.part"))
    listing = json.loads(folder.with_suffix(".json").read_text())
    assert listing["config.json"][0] == (split / "config.json").stat().st_size


def test_the_folders_of_a_folder_are_listed(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    for key, value in store.environment(tmp_path).items():
        monkeypatch.setenv(key, value)
    s3fs.S3FileSystem.clear_instance_cache()
    for key in ("adapters/b/adapter_config.json", "adapters/a/adapter_config.json", "adapters/README.md"):
        store.put(key, b"{}")
    assert subfolders("s3://models/adapters") == ["a", "b"]
    assert subfolders("s3://models/nothing") == []
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UnreachableError, match="s3://nobody/adapters: cannot be listed"):
        subfolders("s3://nobody/adapters")
