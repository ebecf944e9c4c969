"""Benchmarks of whole engines and services, and the hosts that they run on. What needs no engine is
`benchmarks.data_plane`."""
