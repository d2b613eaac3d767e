"""Other libraries' models and files, one file for each; an optional peer is imported by its own file only."""
