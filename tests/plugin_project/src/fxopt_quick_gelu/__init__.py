"""The fusion quick_gelu for fxopt."""
