"""What more than one network needs; a package, so it is never listed as a network."""
