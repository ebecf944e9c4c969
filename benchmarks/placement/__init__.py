"""Benchmarks of the planner: no process, no engine. Placements under a running service are `benchmarks.serving`."""
