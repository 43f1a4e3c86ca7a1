"""Measures models and kernels against dense baselines: the library of the benchmark commands."""
