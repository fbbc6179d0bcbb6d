"""Engines run client tasks somewhere; the round loop and the checkpoint are the same for all of them."""
