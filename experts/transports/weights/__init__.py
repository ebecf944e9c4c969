"""Packed experts from the memory of one shard into that of another: agreement, frames, shared memory, TCP, checksums.
Which experts are copied from where, and which slot they get, is decided in `experts.shard`."""
