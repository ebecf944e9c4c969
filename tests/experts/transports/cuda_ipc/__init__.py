"""Tests of pairs between GPUs that map each other's memory."""
