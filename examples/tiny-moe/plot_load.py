"""Draws the load of every expert by domain from metrics.json into expert_load.png."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from corpus import DOMAINS

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Draw one heat map per layer: domains down, experts across, sorted by the domain that uses them most."""
    metrics = json.loads((HERE / "metrics.json").read_text())
    shares_DLE = np.array([metrics["load_share"][name] for name in DOMAINS])
    layers, experts = shares_DLE.shape[1:]
    figure, axes = plt.subplots(layers, 1, figsize=(10, 1.55 * layers + 0.8), layout="constrained")
    for layer, axis in enumerate(axes):
        shares_DE = shares_DLE[:, layer]
        favourite = shares_DE.argmax(0)
        order = np.lexsort((-shares_DE.max(0), favourite))
        image = axis.imshow(shares_DE[:, order] * experts, cmap="viridis", aspect="auto", vmin=0, vmax=6)
        axis.set_yticks(range(len(DOMAINS)), DOMAINS)
        axis.set_xticks(range(experts), order.tolist(), fontsize=7)
        axis.tick_params(length=0)
        axis.set_title(f"layer {layer}", loc="left", fontsize=10)
    axes[-1].set_xlabel("expert, sorted in each layer by the domain that uses it most")
    figure.colorbar(image, ax=axes, label="load relative to an even share", extend="max", fraction=0.03)
    figure.suptitle("Expert load on held-out text, by domain")
    figure.savefig(HERE / "expert_load.png", dpi=110)


if __name__ == "__main__":
    main()
