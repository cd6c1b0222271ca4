"""The three products of a layer: which way each takes, and the operators a compiler sees."""
