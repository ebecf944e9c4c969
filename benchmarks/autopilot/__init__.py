"""The autopilot against what else could be done. `day` simulates one, `shift` changes the traffic of a live service."""
