"""Kernels of our own; each folder is one operation."""
