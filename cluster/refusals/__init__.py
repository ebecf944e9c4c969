"""What is refused when an application is built, before anything is touched, although its sections are well-formed:
engine options, Serve options, files of the model. What a section alone can tell is checked in `cluster.config`."""
