"""Robot models: kinematics."""
