"""Odd requests against the HTTP API while a neighbour streams. Speed is measured in the folder above."""
