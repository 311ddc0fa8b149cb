"""``train.py doctor``: says before a long run what is missing for it, with the remedy."""
