"""Expert MLPs as Triton programs, and the tiles that pairs are cut into for them. Only the `_programs` modules need
triton to be imported. The Triton programs of dispatch are in `experts.dispatch`."""
