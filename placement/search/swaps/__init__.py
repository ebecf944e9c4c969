"""Searches that swap experts between slots, where each replica takes a fixed share of its expert's tokens. Searches
that ask the rule anew after every move are `placement.search.replicas`.
"""
