"""The hospital node: studies in, results in the archive, nothing lost, nothing leaked."""
