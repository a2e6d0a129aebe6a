"""The baseline that the volume-query policy is measured against: poses regressed from a pooled vector."""
