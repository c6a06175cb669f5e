"""GPT-2 from scratch in JAX and Flax linen: from raw text to sampled verse, every detail open to view."""

__version__ = '0.1.0'
