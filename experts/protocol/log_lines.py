"""What a log line says of the process that wrote it, and lines as JSON for processes that Ray Serve does not set up.

Keys are those of Serve's own JSON lines, which are logging's names: asctime, levelname, message, filename, lineno,
process; then role, rank, epoch, router, where they are known; request_id and trace_id, where a request is.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

_fields: dict[str, Any] = {}


def set_log_fields(**fields: Any) -> None:
    """Have each JSON line of this process bear these from now on; None takes one off. A function is asked each time."""
    _fields.update(fields)


class ProcessFields(logging.Filter):
    """Filters nothing: adds what `set_log_fields` was told, and the trace in progress."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Always True."""
        for name, field in _fields.items():
            value = field() if callable(field) else field
            if value is not None and not hasattr(record, name):
                setattr(record, name, value)
        opentelemetry = sys.modules.get("opentelemetry.trace")  # who traces has imported it
        if opentelemetry is not None and not hasattr(record, "trace_id"):
            context = opentelemetry.get_current_span().get_span_context()
            if context.is_valid:
                record.trace_id, record.span_id = f"{context.trace_id:032x}", f"{context.span_id:016x}"
        return True


def json_formatter(**_: Any) -> logging.Formatter:
    """One line a record, whatever is in it. Also what vLLM's logging is told to use (vllm_plugin/json_logging.json)."""
    from pythonjsonlogger.json import JsonFormatter

    names = ("asctime", "levelname", "message", "filename", "lineno", "process")
    return JsonFormatter(" ".join(f"%({name})s" for name in names), rename_fields={"exc_info": "exc_text"})


def log_to_stderr(log_format: str, **fields: Any) -> None:
    """Send everything that this process logs to standard error, as "text" or "json"."""
    set_log_fields(**fields)
    handler = logging.StreamHandler()
    whose = " ".join(str(fields[name]) for name in ("role", "rank") if name in fields)
    text = logging.Formatter(f"%(asctime)s {whose} %(levelname)s %(message)s")
    handler.setFormatter(json_formatter() if log_format == "json" else text)
    handler.addFilter(ProcessFields())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
