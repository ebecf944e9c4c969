"""Expert MLPs as Triton programs, and how pairs are cut into tiles for them. Importing these modules needs triton;
Triton programs of the dispatch live in `experts.dispatch`."""
