"""Configuration groups, read by Hydra as the config module ``kvbench.conf``."""
