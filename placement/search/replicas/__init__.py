"""The search over slots with replicas, which asks the rule for choosing replicas anew after every move. Searches with
fixed shares are `placement.search.swaps`.
"""
