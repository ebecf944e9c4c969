"""JSON lines: one object a record, whatever is in it, with what is known of the process and of the trace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def lines_of(code: str, *, stream: str = "stderr") -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return getattr(done, stream).splitlines()


def test_every_record_is_one_object_with_the_fields_of_its_process() -> None:
    lines = lines_of(
        "import logging\n"
        "from experts.protocol.log_lines import log_to_stderr, set_log_fields\n"
        "log_to_stderr('json', role='shard', rank=3, epoch=lambda: epoch)\n"
        "log, epoch = logging.getLogger('experts.x'), 7\n"
        "log.info('two\\nlines of %s', 'text')\n"
        "epoch = 8\n"
        "set_log_fields(rank=None, router='r1')\n"
        "try:\n"
        "    1 / 0\n"
        "except ZeroDivisionError:\n"
        "    log.exception('failed: \\udc80')\n"
        "log.warning('own', extra={'rank': 5})\n"
    )
    first, second, third = map(json.loads, lines)
    assert set(first) == {"asctime", "levelname", "message", "filename", "lineno", "process", "role", "rank", "epoch"}
    assert (first["message"], first["levelname"]) == ("two\nlines of text", "INFO")
    assert (first["role"], first["rank"], first["epoch"]) == ("shard", 3, 7)
    assert (second["epoch"], second["router"], second["levelname"]) == (8, "r1", "ERROR")
    assert "rank" not in second
    assert "ZeroDivisionError" in second["exc_text"]
    assert third["rank"] == 5, "a record's own field stays"


def test_text_names_the_process() -> None:
    [line] = lines_of(
        "import logging\n"
        "from experts.protocol.log_lines import log_to_stderr\n"
        "log_to_stderr('text', role='shard', rank=3)\n"
        "logging.getLogger('experts').info('here')\n"
    )
    assert line.endswith(" shard 3 INFO here")


def test_a_line_within_a_trace_names_it() -> None:
    inside, outside = map(
        json.loads,
        lines_of(
            "import logging\n"
            "from opentelemetry import trace\n"
            "from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags\n"
            "from experts.protocol.log_lines import log_to_stderr\n"
            "log_to_stderr('json')\n"
            "with trace.use_span(NonRecordingSpan(SpanContext(10, 11, False, TraceFlags(1)))):\n"
            "    logging.info('inside')\n"
            "logging.info('outside')\n"
        ),
    )
    assert (inside["trace_id"], inside["span_id"]) == (f"{10:032x}", f"{11:016x}")
    assert "trace_id" not in outside


def test_vllm_takes_the_shipped_file() -> None:
    """As vLLM does when it is imported with VLLM_LOGGING_CONFIG_PATH."""
    [line] = lines_of(
        "import json, logging, logging.config\n"
        "from experts.protocol.log_lines import set_log_fields\n"
        "from experts.vllm_plugin.engine_kwargs import JSON_LOGGING\n"
        "logging.config.dictConfig(json.loads(JSON_LOGGING.read_text()))\n"
        "set_log_fields(role='engine', epoch=4)\n"
        "logging.getLogger('vllm.engine').info('hello %d', 5)\n"
        "logging.getLogger('vllm.engine').debug('not this')\n",
        stream="stdout",
    )
    told = json.loads(line)
    assert (told["message"], told["role"], told["epoch"]) == ("hello 5", "engine", 4)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_shard_without_serve_logs_as_it_is_told(log_format: str) -> None:
    arguments = ["--settings", "{}", "--placement", "none", "--rank", "2", "--log-format", log_format]
    code = (
        "import sys, logging\n"
        f"sys.argv = ['server', *{arguments!r}]\n"
        "import experts.shard.server as server\n"
        "def stop(settings): logging.getLogger('experts').info('stop'); raise SystemExit\n"
        "server.ShardServer = stop\n"
        "server.ShardSettings = type('S', (), {'model_validate_json': staticmethod(lambda text: None)})\n"
        "server.main()\n"
    )
    [line] = lines_of(code)
    if log_format == "json":
        assert (json.loads(line)["message"], json.loads(line)["rank"]) == ("stop", 2)
    else:
        assert line.endswith("shard 2 INFO stop")
