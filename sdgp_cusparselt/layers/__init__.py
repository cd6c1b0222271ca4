"""What a model is made of: autograd functions, modules, conversion, steps of a schedule."""
