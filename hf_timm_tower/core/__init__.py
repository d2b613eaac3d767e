"""Old import paths of version 0.1, for scripts that have them; the package itself uses none of this."""
