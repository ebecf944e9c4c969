"""The placement controller: deployment, roster, first placement, and how others call it. Searching for placements is
`placement`, moving weights `experts.shard`."""
