"""Which secret a mesh has, through every restart of its controller."""

from __future__ import annotations

from experts.protocol.secret import MeshSecret


class SecretKeeper:
    """The controller's memory of the secret. It is on no disk: whoever holds it brings it to the next controller."""

    def __init__(self, env: str | None) -> None:
        """`env`: the environment variable that has it, whatever the others hold. MeshSecretError if it has none."""
        self._secret = None if env is None else MeshSecret.from_environment(env)

    def agree(self, held: MeshSecret | None, settled: bool) -> MeshSecret | None:
        """The secret for a caller that holds one already, or none; it takes it on.

        The first that is brought to a controller that knows none is the mesh's. Only when whoever could bring one had
        time to (`settled`) is a new one made; until then who holds none gets None and asks again.
        """
        if self._secret is None:
            self._secret = held or (MeshSecret.generate() if settled else None)
        return self._secret
