"""Thin adapters, one file per host. Nothing outside this folder imports a host."""
