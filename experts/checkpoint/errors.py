"""The error of an unreadable checkpoint."""

from __future__ import annotations


class CheckpointError(ValueError):
    """The checkpoint cannot be read; the message names the file, key or tensor, and what was expected."""


class UnreachableError(CheckpointError):
    """The hub or the store does not answer now; later it may."""
