"""The benchmark of prefill and decode pools against one pool of routers. Other benchmarks of a whole service are beside
this folder.
"""
