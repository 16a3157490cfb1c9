"""Diffusion and flow matching models: images, scored by the denoising error."""
