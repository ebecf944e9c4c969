"""What tests of several files share: oracles, made-up inputs, processes and waiting. No test belongs here, nor what a
single file needs.
"""
