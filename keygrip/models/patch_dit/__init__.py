"""System 3: a latent diffusion transformer steered by text and by the DINO features of a reference image."""
