"""The placement controller: the deployment, its planner, what people see of it, and the client that calls it. Its state
is `cluster.mesh`, searching for placements is `placement`, moving weights is `experts.shard`.
"""
