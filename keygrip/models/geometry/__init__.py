"""Camera geometry and rotations: projection, ray-plane intersection, quaternions and their discrete codes."""
