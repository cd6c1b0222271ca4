"""Training on real data that ships inside packages: dense beside SDGP, from the same seeds."""
