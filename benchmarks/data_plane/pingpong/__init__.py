"""Peers of `benchmarks.data_plane.transport_pingpong`, and its sides in shared memory; what it measures stays there."""
