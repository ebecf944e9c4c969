"""The router deployment and its life: epochs, health, Serve options. Dispatch itself is `experts.dispatch`."""
