"""System 1: a robot policy that predicts pixel x height voxels, gripper and rotation bins from one image."""
