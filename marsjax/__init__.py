"""MARS, modality-aligned retrieval for sequence-augmented CTR prediction, in JAX and Flax."""

__version__ = "0.1.0"
