"""System 2: a video-language model with one visual token per frame, whose query the language model chooses."""
