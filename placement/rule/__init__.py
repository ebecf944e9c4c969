"""Which replica a token takes, and what that makes of loads: one rule, shared by routers and planner. Searching for
better placements is `placement.search`."""
