"""Train the demo model: make sprites and scenes, then train its text encoders, VAE and transformer."""
