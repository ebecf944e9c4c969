"""API keys: who holds one, what each may use, and how several routers keep to it together. What a request meets of them
is in `cluster.http`, who may use the console in `cluster.console`."""
