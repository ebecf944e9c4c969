"""From one placement to another, round by round, with every expert served in between. This plans the copies;
`experts.shard` makes them.
"""
