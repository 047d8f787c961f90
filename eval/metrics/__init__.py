"""Quality metrics: pictures, features or latents in, numbers out; no runs and no pipelines."""
