"""Open requests of routers, as far as a request router knows: what it was told last, and what it has sent since."""

from __future__ import annotations

from collections.abc import Iterable


class Loads:
    """By router. Behind HAProxy nobody says when a request ends, so routers are asked again and again.

    A router that answers may not have got yet what was sent to it just before it was asked. So what was sent between
    the last two questions counts beside the answer, though it may be in it.
    """

    def __init__(self) -> None:
        self._told: dict[str, int] = {}
        self._before: dict[str, int] = {}  # sent between the question that was answered last and the one before it
        self._asked: dict[str, int] = {}  # sent between that question and the one that is not answered yet
        self._since: dict[str, int] = {}  # sent since the router was last asked

    def of(self, router: str) -> int:
        """Requests that have ended since count too; those that other request routers sent since do not."""
        return sum(each.get(router, 0) for each in (self._told, self._before, self._asked, self._since))

    def sent(self, router: str) -> None:
        """A request went to it."""
        self._since[router] = self._since.get(router, 0) + 1

    def asked(self, router: str) -> None:
        """It is asked now."""
        self._asked[router] = self._asked.get(router, 0) + self._since.pop(router, 0)

    def answered(self, router: str, open_requests: int) -> None:
        """Its answer to the last question."""
        self._told[router] = open_requests
        self._before[router] = self._asked.pop(router, 0)

    def keep(self, routers: Iterable[str]) -> None:
        """Forget all others."""
        known = set(routers)
        for each in (self._told, self._before, self._asked, self._since):
            for router in each.keys() - known:
                del each[router]
