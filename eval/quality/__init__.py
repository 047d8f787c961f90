"""`dma-diffusers eval` measures what low precision changes in the pictures of a pipeline."""
