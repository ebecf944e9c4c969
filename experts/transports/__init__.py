"""How bytes travel between a router and a shard: one file a transport, `control.py` to agree on one. What the bytes
mean is `experts.protocol`.
"""
