"""Plan, pack and combine: which row goes to which shard, and the sum of what comes back. One interface (`base`), one
file for each way to do it; links, time-outs and failover belong to the dispatcher."""
