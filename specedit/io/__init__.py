"""Files: pictures read as a viewer shows them, and written whole or not at all."""
