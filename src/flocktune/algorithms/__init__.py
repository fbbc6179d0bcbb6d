"""Algorithms: each is two halves in one file, a server's and a client's."""
