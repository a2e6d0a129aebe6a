"""Apply trained models to users' inputs: generate images, answer questions."""
