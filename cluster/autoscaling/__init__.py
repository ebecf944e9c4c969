"""How many shards and routers there should be: what is measured for that, and the policies of Serve's autoscaler.
Starting and stopping them is Serve's part, moving experts that of `cluster.mesh`.
"""
