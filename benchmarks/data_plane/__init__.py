"""Benchmarks of dispatch, transports, shards and kernels without an engine. Whole engines are `benchmarks.serving`."""
