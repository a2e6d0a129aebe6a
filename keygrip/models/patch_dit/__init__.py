"""System 3: a latent diffusion transformer conditioned on text and on the DINO features of a reference image."""
