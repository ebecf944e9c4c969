"""What a check finds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from cluster.config.parse import ConfigError


class Kind(StrEnum):
    """What follows from a finding."""

    refused = "refused"  # the service would not come up
    warning = "warning"  # it would, and its user should know
    not_checked = "not checked"  # this machine cannot tell
    served = "served"  # what is known of a model that would be


@dataclass(frozen=True)
class Finding:
    """One line; it begins with the file and the key."""

    kind: Kind
    text: str


@dataclass
class Findings:
    """What was found in one file."""

    file: str
    found: list[Finding] = field(default_factory=list)

    @property
    def refused(self) -> bool:
        return any(finding.kind is Kind.refused for finding in self.found)

    def add(self, kind: Kind, *lines: str) -> None:
        """Add lines, each once."""
        for line in lines:
            finding = Finding(kind, " ".join(line.split()))
            if finding not in self.found:
                self.found.append(finding)

    def refuse(self, lines: Iterable[str] | ConfigError) -> None:
        """Add what would be refused."""
        self.add(Kind.refused, *(str(lines).splitlines() if isinstance(lines, ConfigError) else lines))

    def to_dict(self) -> dict[str, object]:
        """Plain data."""
        told = [{"kind": str(finding.kind), "text": finding.text} for finding in self.found]
        return {"file": self.file, "accepted": not self.refused, "findings": told}

    def lines(self) -> Iterator[str]:
        """For people: the verdict, then what is worst first."""
        yield f"{self.file}: {'refused' if self.refused else 'accepted'}"
        for kind in Kind:
            yield from (f"  {kind}: {finding.text}" for finding in self.found if finding.kind is kind)
