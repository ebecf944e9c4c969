"""A shard's control port: proof that both sides know the mesh's secret, and the one thread that accepts and watches.
What a connection is for once it is open, and the side that connects, are one folder up."""
