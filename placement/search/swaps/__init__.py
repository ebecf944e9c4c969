"""Searches that swap experts between slots while each replica keeps its tokens. The search that applies the rule for
choosing replicas again after every move is `placement.search.replicas`.
"""
