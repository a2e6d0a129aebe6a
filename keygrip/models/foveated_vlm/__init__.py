"""System 2: a video-language model with one visual token per frame, from a query that the language model chooses."""
