"""A shard's side: its server, compute loop, check of requests, slots. Weights in files are `experts.checkpoint`, the
arithmetic is `experts.kernels`."""
