"""Smaller updates: codecs of values, the largest of them, bytes; and the transform that is made of these."""
