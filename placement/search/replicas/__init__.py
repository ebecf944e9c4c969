"""The search over slots with replicas, which applies the rule for choosing replicas again after every move. Searches in
which replicas keep their tokens are `placement.search.swaps`.
"""
