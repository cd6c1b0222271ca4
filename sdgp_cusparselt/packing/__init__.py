"""The compression layer: from a gradient to cuSPARSELt's compressed operand."""
