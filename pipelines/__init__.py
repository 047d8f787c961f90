"""Images and videos from stock Diffusers pipelines, and the demo models that come with the package."""
