"""Other libraries' hooks for our layers, one file each; a file imports its library, so import the one that you need."""
