"""One complete YAML per run; a package, so that the wheel carries it."""
