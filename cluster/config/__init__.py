"""The schema of the Serve config file, one file a kind of section, and how its errors read. Nothing here starts
anything."""
