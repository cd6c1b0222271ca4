"""cuSPARSELt in Python: the C API as it is, and objects that own its lifetimes."""
