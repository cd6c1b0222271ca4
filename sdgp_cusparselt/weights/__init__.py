"""2:4 weights: masks, recipes that train them, and what a layer holds of them."""
