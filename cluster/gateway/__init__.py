"""The application `gateway`: one address for several models, each request passed on by HTTP to a router of its model.

What it is told is in `cluster/config/gateway`. Nothing of a single model's service belongs here, which HAProxy reaches
without a gateway.
"""
