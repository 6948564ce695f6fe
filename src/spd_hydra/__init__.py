"""Stochastic Parameter Decomposition of neural networks, configured with Hydra."""
