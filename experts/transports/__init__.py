"""How bytes travel between a router and a shard: one file for each transport, and `control.py` to agree on one. What
the bytes mean is defined in `experts.protocol`.
"""
