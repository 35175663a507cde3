"""Pictures of a learned set and of its training."""
