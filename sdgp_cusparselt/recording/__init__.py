"""What layers write down while they run: counts, times, gradient errors."""
