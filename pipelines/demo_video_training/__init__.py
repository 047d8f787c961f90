"""Training of the demo video model: animated sprites, clips, autoencoder and transformer."""
