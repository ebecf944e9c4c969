"""Benchmarks that need a CUDA device. Each has a rehearsal without one: `--device cpu`."""
