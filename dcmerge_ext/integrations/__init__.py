"""Drop-in parts for other libraries. Nothing here is imported by :mod:`dcmerge_ext` itself."""
