"""The bench `otg`: images of a diffusion model, led or not, against recovered ones."""
