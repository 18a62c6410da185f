"""Triton kernels, imported at the first launch: one module of launches per operator, kernels and tile choices beside.

A launch module's functions bear the names of the operators that they serve; see ``launch`` for the convention.
"""
