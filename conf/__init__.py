"""The configuration files as a package, so that Hydra finds them wherever spd_hydra is installed."""
