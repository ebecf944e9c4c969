"""What is configured where several models share one address: the gateway's sections, and how the applications of such a
file fit together. What the gateway does with it is in `cluster/gateway`; sections of one model stand a folder above.
"""
