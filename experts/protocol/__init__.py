"""What a router and a shard agree on: bytes of messages, memberships, statuses, settings, errors. Nothing here sends,
computes or waits; both ends import it, and it imports neither."""
