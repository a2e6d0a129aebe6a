"""Robot models: kinematics, joint motion, self-collision, surfaces."""
