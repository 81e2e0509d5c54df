"""Autograd Functions that keep packed tensors."""
