"""Quality metrics take pictures, features or latents and return numbers; they know no runs and no pipelines."""
