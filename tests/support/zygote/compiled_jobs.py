"""What torch.compile makes of the plug-in's two ops, without an engine.

Legend: T tokens, K top-k, E experts, D hidden size, F width of the shared experts.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

T, K, E, D, F, LAYERS = 24, 2, 8, 64, 64, 2


def compiled_layer(emit: Any, apart: bool) -> None:
    """Two layers with shared experts: in what order things run, whether rows stay as they were sent, and the sums.

    `apart`: shared experts get another input than the routed ones, as in models that transform one of them.
    """
    import torch

    from experts.vllm_plugin import layer as plugin

    plugin.register()
    events: list[str] = []
    intact: list[bool] = []

    class Client:
        """Doubles each row, at the end; looks then whether what it may have to send again is still there."""

        attached = True
        recorder = SimpleNamespace(wants_phases=False)
        dispatcher = SimpleNamespace(mover=SimpleNamespace(wants_hints=False))

        def begin(
            self, layer: int, x_TD: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor, record: bool
        ) -> Any:
            events.append("begin")
            sent = [tensor.clone() for tensor in (x_TD, weights_TK, ids_TK)]
            return SimpleNamespace(now=(x_TD, weights_TK, ids_TK), sent=sent, y_TD=torch.empty_like(x_TD))

        def finish(self, pending: Any) -> None:
            events.append("finish")
            intact.append(all(map(torch.equal, pending.now, pending.sent)))
            pending.y_TD.copy_(2 * pending.now[0])

    @torch.library.custom_op("expertmesh_tests::note", mutates_args=(), schema="(Tensor x) -> Tensor")
    def note(x_TD: torch.Tensor) -> torch.Tensor:
        events.append("shared")
        return x_TD.clone()

    @note.register_fake
    def _(x_TD: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x_TD)

    up_DF, down_FD, gate_DE = torch.randn(D, F) / 8, torch.randn(F, D) / 8, torch.randn(D, E) / 8

    class Shared:
        """As vLLM's: keeps its output until somebody takes it."""

        def __init__(self) -> None:
            self._output: list[torch.Tensor | None] = [None, None]
            self._output_idx = 0

        def __call__(self, x_TD: torch.Tensor, order: Any) -> None:
            self._output[0] = note(torch.nn.functional.silu(x_TD @ up_DF).relu() + 1) @ down_FD

        def take(self) -> torch.Tensor:
            output, self._output[0] = self._output[0], None
            assert output is not None
            return output

    layers = [(plugin.MeshExpertsMixin(), Shared()) for _ in range(LAYERS)]
    for layer, (mesh, _) in enumerate(layers):
        mesh.mesh_layer = layer

    def forward(x_TD: torch.Tensor) -> torch.Tensor:
        for mesh, shared in layers:
            h_TD = torch.nn.functional.layer_norm(x_TD, (D,))
            weights_TK, ids_TK = torch.topk((h_TD @ gate_DE).softmax(-1), K)
            shared_TD = h_TD * 0.5 if apart else h_TD
            y_TD = mesh.forward_modular(h_TD, weights_TK, ids_TK, shared, shared_TD)
            x_TD = x_TD + y_TD + shared.take()
        return x_TD

    plugin._engine.client = Client()  # type: ignore[assignment]
    x_TD = torch.randn(T, D)
    with torch.inference_mode():
        expected_TD = forward(x_TD.clone())
        emit(eager=events.copy())
        events.clear()
        intact.clear()
        found_TD = torch.compile(forward, fullgraph=True)(x_TD.clone())
        emit(intact=intact, difference=(found_TD - expected_TD).abs().max().item(), compiled=events)
