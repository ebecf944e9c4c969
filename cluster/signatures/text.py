"""A prompt's text as a small vector: how often which three bytes follow one another, hashed to a few buckets."""

from __future__ import annotations

from typing import Any

import numpy as np

BUCKETS = 256
EDGE_CHARS = 512  # of the beginning of a text, and as many of its end


def text_of(body: Any) -> str:
    """The prompt or the messages of a request's parsed body, as far as they are text; empty if none are."""
    return _joined(getattr(body, "messages", None) or getattr(body, "prompt", None))


def features(text: str) -> np.ndarray:
    """uint8 [BUCKETS], the largest one 255: square roots of counts, so that a few frequent ones do not drown others.

    All zeros for fewer than three bytes.
    """
    if len(text) > 2 * EDGE_CHARS:
        text = text[:EDGE_CHARS] + text[-EDGE_CHARS:]
    bytes_N = np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.uint32)
    if len(bytes_N) < 3:
        return np.zeros(BUCKETS, np.uint8)
    words = bytes_N[:-2] | bytes_N[1:-1] << 8 | bytes_N[2:] << 16
    counts = np.bincount((words * np.uint32(2654435761)) >> np.uint32(24), minlength=BUCKETS)
    roots = np.sqrt(counts)
    return np.rint(roots * (255 / roots.max())).astype(np.uint8)


def _joined(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(text for text in map(_joined, value) if text)
    if isinstance(value, dict):
        return _joined(value.get("text") or value.get("content"))
    return ""
