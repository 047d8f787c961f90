"""Train the demo video model: make animated sprites and clips, then train its autoencoder and transformer."""
