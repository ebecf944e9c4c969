"""Which replica a token takes, and the loads and fan-out that follow: one rule, shared by routers and planner.
The search for better placements is `placement.search`.
"""
