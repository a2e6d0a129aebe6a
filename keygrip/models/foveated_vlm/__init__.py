"""System 2: a video-language model that spends one visual token per frame and chooses where to look next."""
