"""The attention's backward over the precision map."""
