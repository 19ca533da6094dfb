"""Fuzzing of everything that comes from somebody else: damaged, hostile and merely odd files through the package.

``PYTHONPATH=tests python -m fuzz --cases 100000 --seed 1`` runs it; CONTRIBUTING.md says how to repeat a case.
"""
