"""What protects clients from the server and from whoever sees the result: noise, its accounting, secret keys."""
