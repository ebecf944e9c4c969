"""What tests of the Ray side share: the running service, shipped configs, made-up statuses. Tests of the data plane do
not need Ray: their helpers are beside this folder.
"""
