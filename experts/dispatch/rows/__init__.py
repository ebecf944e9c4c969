"""Plan, pack and combine: which row goes to which shard, and the sum of what comes back. One interface, one file for
each way to do it; links, deadlines and failover are the dispatcher's."""
