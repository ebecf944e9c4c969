"""What people who run the service look at: status, placement, routing trace, usage. What clients of the model see is
`cluster.http`; series for Prometheus come from Ray's metrics agent (`cluster.observability`)."""
