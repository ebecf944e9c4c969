"""Benchmarks of whole engines and services, and the hosts they run on. Benchmarks of the data plane alone are in
`benchmarks.data_plane`."""
