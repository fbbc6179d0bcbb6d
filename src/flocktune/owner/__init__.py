"""The data owner's side of a real federation: joining, the worker that stays, what may leave, what has left."""
