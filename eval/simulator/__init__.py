"""What a neighbourhood could save: tiles visited, counted, never timed."""
