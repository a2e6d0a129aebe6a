"""The baseline for the volume-query policy: poses regressed from a pooled vector."""
