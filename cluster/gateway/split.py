"""Which version of a model gets a request: exact shares, or one version for each key or value of a header."""

from __future__ import annotations

import hashlib
import math

from cluster.config.gateway.sections import VersionsSection


class Split:
    """The choice for one model. One that is made anew starts its count of shares anew."""

    def __init__(self, versions: VersionsSection) -> None:
        self.versions = versions
        self._weights = {name: version.weight for name, version in versions.versions.items()}
        self._credit = dict.fromkeys(self._weights, 0)

    def order(self, sticky: str | None) -> list[str]:
        """The version to ask, then the others in the order to try where its routers are gone: by weight.

        `sticky`: what all requests of one version have in common; None counts this request by itself. Of every N
        requests that are counted so, N the sum of the weights, each version gets exactly its weight.
        """
        chosen = self._next() if sticky is None else self._for(sticky)
        others = sorted((name for name in self._weights if name != chosen), key=lambda name: -self._weights[name])
        return [chosen, *others]

    def _next(self) -> str:
        """Smooth weighted round robin: everyone earns its weight, and who has most pays for all."""
        for name, weight in self._weights.items():
            self._credit[name] += weight
        chosen = max((name for name in self._weights if self._weights[name]), key=self._credit.__getitem__)
        self._credit[chosen] -= sum(self._weights.values())
        return chosen

    def _for(self, sticky: str) -> str:
        """Rendezvous hashing by weight: a changed weight moves only what comes to its version or leaves it."""
        return max((name for name in self._weights if self._weights[name]), key=lambda name: self._score(name, sticky))

    def _score(self, name: str, sticky: str) -> float:
        digest = hashlib.blake2b(f"{name}\0{sticky}".encode(), digest_size=8).digest()
        uniform = (int.from_bytes(digest, "big") + 0.5) / 2**64
        return self._weights[name] / -math.log(min(uniform, 1 - 2**-53))
