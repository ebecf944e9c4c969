"""What sizing refuses."""

from __future__ import annotations


class SizingError(ValueError):
    """A question that has no answer. The message is one line: the value, what was expected, and the remedy."""


class NoLayoutError(SizingError):
    """No number of GPUs up to the limit serves the load; the message says what stands in the way."""
