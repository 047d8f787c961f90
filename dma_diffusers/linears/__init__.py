"""Low-bit linear layers in a Diffusers transformer: choosing, calibrating, quantising, files, receipts."""
