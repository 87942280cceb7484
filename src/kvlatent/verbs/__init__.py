"""What the command line's verbs do, from names and folders to folders; every check that can be early comes early."""
