"""What `expertmesh serve` says of the service that it has started."""

from __future__ import annotations

import re
import shlex
import subprocess

from tests.support.serve.service import API_KEY, Service


def test_the_curl_line_that_it_prints_works(service: Service) -> None:
    found = re.search(r"curl http.*?\\\n.*?}'", service.log.read_text(), re.DOTALL)
    assert found is not None, service.log.read_text()
    curl = shlex.split(found.group(0).replace("\\\n", " ").replace("$API_KEY", API_KEY))
    answer = subprocess.run([*curl, "--silent"], capture_output=True, text=True, timeout=120)
    assert '"object":"chat.completion"' in answer.stdout, answer.stdout + answer.stderr
