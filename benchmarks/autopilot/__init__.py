"""The autopilot against what else could be done: a simulated day, and a live service whose traffic changes."""
