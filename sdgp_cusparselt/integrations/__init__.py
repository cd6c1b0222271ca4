"""SDGP in other people's trainers: one module for each, which alone imports its host."""
