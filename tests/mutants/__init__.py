"""Changes the sources one at a time and asks whether a test notices: `make mutants`, or `python -m tests.mutants`. What
judges a module is in `judges.py`, what may survive in `explained.toml`; the tests themselves belong beside all others.
"""
