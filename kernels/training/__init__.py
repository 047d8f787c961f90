"""Linear layers that train at low precision: quantisers with gradients, and products in both passes."""
