"""Hydra's configuration files; hydra.searchpath takes a package."""
