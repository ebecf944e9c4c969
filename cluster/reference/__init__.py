"""Pages of docs/ that are made from code, one module a page: config keys, HTTP endpoints.

Each runs as `python -m`, and a test keeps its page true. The page of metrics is made beside its tables, in
`cluster.observability`.
"""
