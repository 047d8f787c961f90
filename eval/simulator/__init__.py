"""The simulator counts the tiles that a neighbourhood visits, which is what it could save; it times nothing."""
