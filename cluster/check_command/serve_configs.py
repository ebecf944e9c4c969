"""The Serve configs in a file: one as it is, an Anyscale service around one, or RayServices of KubeRay with one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.check_command.findings import Findings, Kind

# Keys of an Anyscale service that Serve does not have.
ANYSCALE = {
    *("name", "project", "cloud", "version_name", "tags", "image_uri", "ray_version", "containerfile", "working_dir"),
    *("registry_login_secret", "env_vars", "py_modules", "excludes", "requirements", "compute_config"),
    *("query_auth_token_enabled", "ray_gcs_external_storage_config"),
}
EXPECTED = "expected a Serve config (a list of applications) or a RayService of KubeRay with spec.serveConfigV2"


@dataclass(frozen=True)
class ServeConfig:
    """A Serve config. `place` is what lines about it begin with, `folder` where relative paths are looked up first."""

    place: str
    data: dict[str, Any]
    folder: Path


def serve_configs(path: Path, findings: Findings) -> Iterator[ServeConfig]:
    """The Serve configs of a file. What is none, or cannot be read, goes to `findings`."""
    place, folder = str(path), path.resolve().parent
    try:
        documents = list(yaml.safe_load_all(path.read_text()))
    except OSError as error:
        findings.refuse([f"{place}: cannot be read: {error.strerror}"])
        return
    except UnicodeDecodeError:
        findings.refuse([f"{place}: is no text; {EXPECTED}"])
        return
    except yaml.YAMLError as error:
        findings.refuse([f"{place}: not YAML: {error}"])
        return
    nothing = True
    for document in documents:
        if not isinstance(document, dict):
            continue
        if document.get("kind") == "RayService":
            nothing = False
            yield from _in_ray_service(document, place, folder, findings)
        elif "applications" in document:
            nothing = False
            if not isinstance(document["applications"], list):
                findings.refuse([f"{place}: applications: {EXPECTED}"])
                continue
            yield ServeConfig(place, _without_anyscale(document), folder)
    if nothing:
        findings.refuse([f"{place}: holds no Serve config; {EXPECTED}"])


def _in_ray_service(document: dict[str, Any], place: str, folder: Path, findings: Findings) -> Iterator[ServeConfig]:
    place = f"{place}: spec.serveConfigV2"
    text = (document.get("spec") or {}).get("serveConfigV2")
    try:
        inner = yaml.safe_load(text) if isinstance(text, str) else text
    except yaml.YAMLError as error:
        findings.refuse([f"{place}: not YAML: {error}"])
        return
    if not isinstance(text, str) or not isinstance(inner, dict) or not isinstance(inner.get("applications"), list):
        findings.refuse([f"{place} is {_shown(text)}, expected the text of a Serve config (a list of applications)"])
        return
    findings.add(Kind.not_checked, f"{place.removesuffix(': spec.serveConfigV2')}: what is around spec.serveConfigV2")
    yield ServeConfig(place, inner, folder)


def _without_anyscale(document: dict[str, Any]) -> dict[str, Any]:
    """The Serve config of an Anyscale service; any other as it is."""
    if not {"image_uri", "compute_config", "containerfile"} & document.keys():
        return document
    return {key: value for key, value in document.items() if key not in ANYSCALE}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
