"""What stands before the OpenAI API: keys, limits, error format, health. Pages and endpoints for people who run the
service are `cluster.console`."""
