"""What low precision changes in the pictures of a pipeline: `dma-diffusers eval`."""
