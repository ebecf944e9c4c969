"""Routers in a prefill and a decode pool: what the section `pools` says, and what it makes of the section `routers`.
What the routers do with it is in `cluster.pools`.
"""
