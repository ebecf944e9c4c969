"""The Ray side: config, Serve deployments, membership and epochs, HTTP, metrics, the command that serves. Rows, weights
and kernels are `experts`; finding placements is `placement`.
"""
