"""What a router and a shard agree on: message bytes, memberships, statuses, settings, errors. Nothing here sends,
computes or waits; both ends import this folder, and it imports neither."""
