"""The tasks behind ``sdgp train``: real data that ships inside packages, dense beside SDGP."""
