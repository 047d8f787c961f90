"""Training of the demo model: sprites, scenes, text encoders, VAE and transformer."""
