"""The schema of the Serve config file: its sections, the two applications made of them, and how errors read.

`serve_file` reads a file, `parse` checks one application's arguments, `apps` lists the sections of each application,
`deployments` checks what Serve changes while replicas run, and the `*_section(s)` files define the sections. `experts`
takes model, shards, controller, and its controller takes placement, migration, membership while it runs; `llm` takes
model, routers, transport, deadlines, http. Each key is in one section only, so that an edit for one application never
restarts the other. Unknown keys are errors. Units are in the names. A default that the data plane has too is read from
its settings. Nothing here starts a process or imports Ray.
"""
