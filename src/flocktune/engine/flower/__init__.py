"""Flower as the transport of real federations. The only room that imports flwr."""
