"""One router of several worker processes (tensor parallelism): which rows each one dispatches, and what they must tell
each other. What a worker sends to shards belongs to `experts.dispatch`."""
