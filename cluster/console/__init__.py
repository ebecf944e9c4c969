"""What people who run the service look at: status, placement, routing trace, usage, and the live page.

What clients of the model see is `cluster.http`; which series there are is `cluster.observability`.
"""
