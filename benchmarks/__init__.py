"""What `make bench` runs: each module prints a table and writes JSON under bench-results/. Checks that must hold are
tests."""
