"""A mesh of made-up shards and routers around the controller's real state, with a clock that the test moves. What needs
a process, a socket or Ray does not belong here.
"""
