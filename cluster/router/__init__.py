"""The router deployment and its life: epochs, health, Serve options, and the client that asks all routers. Dispatch is
`experts.dispatch`; what stands before the OpenAI API is `cluster.http`."""
