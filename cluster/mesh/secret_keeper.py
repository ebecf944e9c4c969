"""Which secret a mesh has, through every restart of its controller."""

from __future__ import annotations

from experts.protocol.secret import MeshSecret, MeshSecretError


class SecretKeeper:
    """The controller's memory of the secret. It is on no disk: whoever holds it brings it to the next controller."""

    def __init__(self, env: str | None) -> None:
        """`env`: the environment variable that has it, whatever the others hold. Without one there: see `refusal`."""
        self.refusal = ""
        """Why no shard can join, one line; empty if they can."""
        self._secret: MeshSecret | None = None
        if env is not None:
            try:
                self._secret = MeshSecret.from_environment(env)
            except MeshSecretError as error:
                self.refusal = f"mesh.secret_env: {error} (the controller's process needs it)"

    def agree(self, held: MeshSecret | None, settled: bool) -> MeshSecret | None:
        """The secret for a caller that holds one already, or none; it takes it on.

        The first that is brought to a controller that knows none is the mesh's. Only when whoever could bring one had
        time to (`settled`) is a new one made; until then who holds none gets None and asks again. After a
        refusal everyone keeps what it holds.
        """
        if self.refusal:
            return held
        if self._secret is None:
            self._secret = held or (MeshSecret.generate() if settled else None)
        return self._secret
