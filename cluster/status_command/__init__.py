"""`expertmesh status`: what a running service says over HTTP, whether it is well, and how that looks in a terminal.
It asks the console and the health route; what changes the service is `cluster.placement_command`.
"""
