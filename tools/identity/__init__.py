"""Pairs of models for check_identity."""
