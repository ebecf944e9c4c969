"""Benchmarks of the planner, without processes or engines. Placements in a running service are in
`benchmarks.serving`."""
