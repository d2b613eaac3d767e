"""A Hub on this machine; see README.md."""
