"""The commands of `expertmesh placement` that need a running service: they show and change where its experts are.
They ask the controller. What is the same over HTTP is `cluster.console.operations`; what it means is
`cluster.controller`."""
