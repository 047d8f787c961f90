"""Which tiles of an attention call exist, in which order tokens stand in them, and which precision each pair gets."""
