"""Lets the tests across hosts use the echo shard of the transports' tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "experts" / "transports"))
