"""When a placement is made to follow the traffic: windows of what routers observe, drift, plans and what came of them.
State and decisions without Ray or a clock; `cluster.controller` drives it, `placement` finds placements, `cluster.mesh`
carries them out.
"""
