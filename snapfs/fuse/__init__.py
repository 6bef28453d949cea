"""The mount: the tree that users see, the control file, and pyfuse3's requests."""
