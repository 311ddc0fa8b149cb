"""CLiFT: compressive light-field tokens, from posed images to adaptive rendering."""
