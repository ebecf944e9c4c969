"""The placement controller: deployment, roster, first placement, its messages and the client that calls it. Searching
for placements is `placement`; moving weights is `experts.shard`."""
