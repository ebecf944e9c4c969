"""What it costs a shard to keep fewer experts resident than it holds, and what prefetch wins back. Kernels by
themselves are in `shard_kernel`."""
