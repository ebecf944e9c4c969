"""A shard's side: server, compute loop, checks of requests, slots. Reading weights from files belongs to
`experts.checkpoint`, the arithmetic to `experts.kernels`."""
