"""Benchmarks that need a CUDA device. Each can be rehearsed without one: `--device cpu`."""
