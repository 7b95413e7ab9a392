"""Other libraries' names and plug-in points."""
