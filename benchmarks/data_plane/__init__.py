"""Benchmarks of dispatch, transports, shards, kernels and fail-over. Throughput of whole engines and services is in
`benchmarks.serving`."""
