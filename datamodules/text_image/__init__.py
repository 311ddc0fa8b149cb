"""Images with their captions, from any of the usual layouts on disk, and prompts to draw."""
