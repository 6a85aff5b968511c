"""Files: opened, checked, written whole or not at all; and where each output comes from."""
