"""The Ray side: config schema, Serve deployments, membership and epochs, HTTP, metrics, the command that serves."""
