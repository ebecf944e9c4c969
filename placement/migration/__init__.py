"""From one placement to another, round by round, with every expert served in between. It plans copies; who makes them
is `experts.shard`."""
