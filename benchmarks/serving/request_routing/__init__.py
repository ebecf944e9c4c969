"""The benchmark of request routers: whoever has the fewest requests, by prefixes, by expert signature; and an estimate
from recorded routing of what the last one can win. Other benchmarks of a whole service are beside this folder.
"""
