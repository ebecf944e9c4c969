"""`expertmesh canary`: which version of a model gets how much of its traffic, shown and changed in a running service.

The change is one of the deployed Serve config, so nothing here keeps any state; how a gateway splits is in
`cluster/gateway`.
"""
