"""What `make bench` runs. Each module prints a table and writes JSON under bench-results/.

Folders: `data_plane` (no engine), `placement` (the planner alone), `serving` (whole engines and services), `gpu`. A
benchmark reports whether a goal is met; what must hold is a test.
"""

from experts.protocol.secret import share_by_environment

share_by_environment()  # each benchmark is a mesh of its own
