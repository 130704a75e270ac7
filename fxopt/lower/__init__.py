"""What becomes of the rewritten graph: implementations of fused ops, Inductor, eager."""
