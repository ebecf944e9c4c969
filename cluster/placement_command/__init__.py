"""`python -m cluster placement ...`: show and change where a running service's experts are, through the controller.
What is the same over HTTP is `cluster.console.operations`; what it means is `cluster.controller`."""
