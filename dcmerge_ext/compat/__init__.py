"""Other people's function signatures on this package's methods, for scripts that should run unchanged but for an import."""
