"""A trained model put to use: entities of a text, of many lines, and its scores on a file."""
