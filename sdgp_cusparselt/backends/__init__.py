"""What can multiply: one module per backend, one contract (base)."""
