"""The expert MLP in C++ for CPUs, and how it is compiled once for a machine. Other compiled code has its own folder."""
