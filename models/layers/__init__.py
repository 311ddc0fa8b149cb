"""Networks and layers that two or more methods share."""
