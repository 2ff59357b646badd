"""Device code only: no torch, no launch. Policies arrive as functions, operands as named tuples."""
