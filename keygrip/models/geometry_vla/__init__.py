"""System 4: a vision-language-action model whose action head reads the geometry of the scene directly."""
