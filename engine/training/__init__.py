"""Training: the routers' optimizer loop."""
