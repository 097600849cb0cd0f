"""Metropolis-Hastings kernels, one a row of ``KERNELS``."""
