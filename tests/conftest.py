"""A strict session: warnings are errors (pyproject.toml), ranks are never promoted, two host devices by default."""

import os

# Set before jax is imported anywhere. A test that needs eight devices starts a process of its own.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
