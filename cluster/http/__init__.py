"""What stands before the OpenAI API: keys, queue limit, error format, health. Endpoints for people who run the service
are `cluster.console`."""
