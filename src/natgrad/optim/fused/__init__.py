"""Layers whose backward pass leaves another gradient than the plain one."""
