"""Tests, in the same folders as the sources. What tests share is in `tests.support`; no test module imports another."""
