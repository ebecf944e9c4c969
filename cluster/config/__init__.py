"""The schema of the Serve config file: its sections, the two applications made of them, and how errors read.

`serve_file` reads a file, `parse` checks one application's arguments, `apps` lists the sections of each application,
and the `*_section(s)` files define them. `experts` takes the sections model, shards, placement, membership; `llm` takes
model, routers, transport, deadlines, http. Each key is in one section only, so that an edit for one application never
restarts the other. Unknown keys are errors. Units are in the names. A default that the data plane has too is read from
its settings. Nothing here starts a process or imports Ray.
"""
