"""Times of a router's layers for traces: noting them while it dispatches, and making OpenTelemetry spans of them in a
thread of their own. Nothing here is imported unless `tracing` is set, and only `spans` knows OpenTelemetry."""
