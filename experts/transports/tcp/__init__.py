"""Pairs over TCP: their two ends, their frames, and how a shard's doorbell hears sockets.
How two sides agree on a pair is `transports.control` and `control_port`.
"""
