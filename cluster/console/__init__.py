"""What people who run the service look at: status, placement, routing trace, metrics. What clients of the model see is
`cluster.http`; which series there are is `cluster.observability`."""
